"""Work that leaves files (a download, an index), done in turns, so that ranks find what others have left.

Rank 0 does it first, then one rank of each other machine, then all others. So it does not matter whether the files are on a
disk that all machines share, or on a disk of each machine: no two ranks make the same file at a time, and a rank with nothing
left to make is quick. No rank goes on before all have done it.

Ranks wait by asking the store of the run. A collective would fail after its time-out, but a download may take hours.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from ..errors import InternEvoError, UsageError
from ..observe.console import log
from .world import World

T = TypeVar("T")
Doing = Callable[[str], AbstractContextManager[Any]]
"""A context that shows what is being done, such as ``Console.doing``."""
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
LONGEST = timedelta(days=2)
"""How long a rank waits for others. It only ends a run of which a rank was killed, if the launcher does not."""
OVER = "over"
"""The key that says that all ranks have done the work, with an empty text, or that one has failed, with its failure."""
QUIET, SAID_AGAIN = 5.0, 600.0
"""Seconds until a rank says that it waits, and until it says so again in its log."""


def in_turns(world: World, name: str, work: Callable[[], T], doing: Doing = nullcontext) -> T:
    """Does the same work on every rank, in turns. Every rank must call it. Returns what ``work`` has returned on this rank.

    Args:
        name: the work; each has its own name in a run.
        doing: is told for whom this rank waits, if it takes long.

    Raises:
        UsageError, InternEvoError: if the work has failed on another rank, with its message. On that rank its own error is
            raised.
    """
    if world.size == 1:
        return work()
    store, host = dist.PrefixStore(f"turns of {name}", world.store), _machine()
    if world.rank == 0:
        store.set("first host", host)
    first = store.get("first host").decode()
    leads = world.rank == 0 or (host != first and store.add(f"ranks of {host}", 1) == 1)
    if world.rank > 0:
        before = first if leads else host
        _wait(store, f"done on {before}", f"a rank on {before.split()[0]}: {name}", doing)
    try:
        found = work()
    except BaseException as error:
        store.set(OVER, _failure(world.rank, error))
        raise
    if leads:
        store.set(f"done on {host}", "")
    if store.add("ranks that are done", 1) == world.size:
        store.set(OVER, "")
    _wait(store, OVER, f"other ranks: {name}", doing)
    return found


def _machine() -> str:
    """Returns the name of this machine, with what tells it from another of the same name, as containers may have."""
    try:
        return f"{socket.gethostname()} {BOOT_ID.read_text().strip()}"
    except OSError:
        return socket.gethostname()


def _failure(rank: int, error: BaseException) -> str:
    known = isinstance(error, InternEvoError)
    text = str(error) if known else f"rank {rank} has failed: {type(error).__name__}: {error}"
    return json.dumps([isinstance(error, UsageError), text])


def _wait(store: dist.Store, key: str, whom: str, doing: Doing) -> None:
    """Waits until a rank has set a key, or has failed.

    Raises:
        UsageError, InternEvoError: if one has failed.
    """
    begin, said = time.monotonic(), 0
    with ExitStack() as shown, _named(whom):
        while not (store.check([key]) or store.check([OVER])):
            waited = time.monotonic() - begin
            if waited > LONGEST.total_seconds():
                raise InternEvoError(f"waited for {LONGEST} for {whom}; the rank may have been killed")
            if waited >= QUIET + said * SAID_AGAIN:
                log.info(f"waiting for {whom}")
                if not said:
                    shown.enter_context(doing(f"waiting for {whom}"))
                said += 1
            time.sleep(min(1.0, 0.01 + waited / 10))
        failure = store.get(OVER).decode() if store.check([OVER]) else ""
    if failure:
        is_usage, text = json.loads(failure)
        raise (UsageError if is_usage else InternEvoError)(text)


@contextmanager
def _named(whom: str) -> Iterator[None]:
    """Says what this rank was waiting for when the process with the store has ended."""
    try:
        yield
    except dist.DistError as error:
        raise InternEvoError(f"a rank has ended while this one waited for {whom}; its own messages say why") from error
