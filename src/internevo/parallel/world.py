"""Connects the processes of a run, which torchrun, Slurm or ``internevo train`` has started; or a single process alone."""

from __future__ import annotations

import os
import re
import secrets
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType

import torch
import torch.distributed as dist

from ..errors import InternEvoError, UsageError
from . import gloo
from .caches import forget_layouts
from .launcher import LauncherInfo, launcher_has_store, read_launcher

TIMEOUT = timedelta(minutes=30)
"""Default time-out of the collectives of training. The first ones wait for ranks that load, compile and connect. Later, the
watchdog (``train.watchdog``) ends a run sooner if a rank does not come to a collective."""

Hook = Callable[[type[BaseException], BaseException, TracebackType | None], object]
"""Of the type of ``sys.excepthook``."""
LOST_RANK = re.compile(r"gloo/transport/|Operation timed out!|NCCL")
"""Matches the messages of collectives that failed because of another rank."""


@dataclass(frozen=True)
class World:
    """This process in the world of a run."""

    rank: int
    size: int
    """Number of ranks."""
    local_rank: int
    """Number of this process on its node, from 0."""
    device: torch.device
    store: dist.Store
    """The key-value store that all ranks can read and write."""


@contextmanager
def join(info: LauncherInfo | None = None, timeout: timedelta = TIMEOUT) -> Iterator[World]:
    """Initializes ``torch.distributed`` with NCCL on GPUs and gloo on CPUs, and frees the process groups at the end.

    After an error, with several ranks, the process groups are not freed: a group cannot be freed before its collectives have
    ended, and those may wait forever for other ranks. The process must then end without freeing anything; ``cli.main`` does so.

    Args:
        info: what the launcher has said; None: it is read from the environment.
        timeout: time-out of the collectives of training.

    Raises:
        UsageError: if this process has already joined a world.
    """
    if dist.is_initialized():
        raise UsageError(
            "this process is in a run already (torch.distributed is initialized), and can be in one only: train or evaluate "
            "when it has ended, or in another process. To evaluate during a run: data.valid_every, monitor.tasks"
        )
    info = info or read_launcher(os.environ)
    device = pick_device(info.local_rank)
    on_cpu = gloo.register()
    if device.type == "cpu" and info.size > 1 and _is_local(os.environ):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = _store(info)
    hook = sys.excepthook
    dist.init_process_group(
        f"cpu:{on_cpu},cuda:nccl" if device.type == "cuda" else on_cpu,
        store=dist.PrefixStore("groups", store),
        rank=info.rank,
        world_size=info.size,
        timeout=timeout,
        device_id=device if device.type == "cuda" else None,
    )
    hooks = sys.excepthook, hook
    try:
        yield World(info.rank, info.size, info.local_rank, device, store)
    except Exception:
        if info.size == 1:
            _leave(*hooks)
        raise
    _leave(*hooks)


def _leave(theirs: Hook, before: Hook) -> None:
    """Frees the process groups, and takes back PyTorch's hook, which writes "[rank0]: " before each line of
    a traceback. (It would wrap itself in the next world.)

    Args:
        theirs: the hook of PyTorch.
        before: the hook that was there before.
    """
    dist.destroy_process_group()
    forget_layouts()
    if sys.excepthook is theirs:  # not if somebody has replaced it since
        sys.excepthook = before


def _store(info: LauncherInfo) -> dist.Store:
    if info.address is None:
        return dist.HashStore()
    try:
        store, _, _ = next(dist.rendezvous(info.address, info.rank, info.size, timeout=TIMEOUT))
    except dist.DistError as error:
        raise InternEvoError(f"rank {info.rank} cannot open the store of the run: {_explain(info, error)}") from error
    store.set_timeout(TIMEOUT)
    assert isinstance(store, dist.Store)
    return of_this_start(store, info.rank, info.size) if launcher_has_store(os.environ) else store


def of_this_start(store: dist.Store, rank: int, size: int) -> dist.Store:
    """Returns the part of a launcher's store that belongs to this start of the ranks. Every rank must call it.

    When torchrun restarts the ranks (``--max-restarts``), its store still has all keys of the ranks before. The number of
    restarts cannot tell them apart, because an agent that replaces a lost one counts from 0. So rank 0 draws a name for each
    start. The other ranks ask for it, each under a word of its own, so that no rank reads an answer to an earlier one.

    Raises:
        InternEvoError: if a rank has not come within ``TIMEOUT``.
    """
    if rank:
        word = secrets.token_hex(8)
        store.set(f"asks/{rank}", word)
        name = store.get(f"name/{word}").decode()
        store.add(f"{name}/here", 1)
        return dist.PrefixStore(name, store)
    name, answered = secrets.token_hex(8), dict[int, bytes]()
    end = time.monotonic() + TIMEOUT.total_seconds()
    while store.add(f"{name}/here", 0) < size - 1:
        if time.monotonic() > end:
            raise InternEvoError(f"only {store.add(f'{name}/here', 0) + 1} of {size} ranks have come within {TIMEOUT}")
        for other in range(1, size):
            if store.check([f"asks/{other}"]) and (asked := store.get(f"asks/{other}")) != answered.get(other):
                store.set(f"name/{asked.decode()}", name)
                answered[other] = asked
        time.sleep(0.01)
    return dist.PrefixStore(name, store)


def _explain(info: LauncherInfo, error: dist.DistError) -> str:
    env = os.environ
    host, port = (info.address or "").rpartition("/")[2].rpartition(":")[::2]
    where = f"{host or env.get('MASTER_ADDR')}:{port if host else env.get('MASTER_PORT')}"
    reason = str(error).splitlines()[0]
    if "EADDRINUSE" in str(error):
        return f"another program, perhaps another run, uses the port of {where}: set MASTER_PORT or give --port ({reason})"
    return f"no answer from rank 0 or the launcher at {where}; it may have ended, or the address is wrong ({reason})"


def is_lost_rank(error: BaseException) -> bool:
    """Whether the error is that of a collective that failed because another rank has ended or does not take part."""
    return isinstance(error, dist.DistError) or bool(LOST_RANK.search(str(error)))


def _is_local(env: Mapping[str, str]) -> bool:
    """Whether all processes are on this machine, and it has a loopback device."""
    return env.get("MASTER_ADDR") in ("127.0.0.1", "localhost") and any(n == "lo" for _, n in socket.if_nameindex())


def has_gpu() -> bool:
    """Whether runs use GPUs: there is a GPU, and INTERNEVO_DEVICE is not "cpu"."""
    return os.environ.get("INTERNEVO_DEVICE") != "cpu" and torch.cuda.is_available()


def first_device() -> torch.device:
    """Returns the first GPU, or the CPU. Unlike ``pick_device``, it takes no memory on the GPU."""
    return torch.device("cuda", 0) if has_gpu() else torch.device("cpu")


def pick_device(local_rank: int) -> torch.device:
    """Returns the GPU of this process and makes it the current one, or returns the CPU."""
    if not has_gpu():
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device
