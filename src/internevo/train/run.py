"""A training run in this process, which may be a rank of it: from a config to the run folder."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import Config, notes
from ..errors import InternEvoError, expect
from ..parallel.launcher import PARENT, LauncherInfo, launcher_has_store, read_launcher
from ..wording import counted
from .check import check
from .config import local_tokenizer
from .resume import Recorded

if TYPE_CHECKING:
    from ..observe.record import StepRecord


def train(
    config: Config,
    on_step: Callable[[StepRecord], object] | None = None,
    *,
    launcher: LauncherInfo | None = None,
    parent: int | None = None,
) -> Path:
    """Trains, as ``internevo train`` does: resumes what is in the run folder, saves, and writes metrics and the report there.

    It uses this process and one device. In a program that torchrun or srun has started, this process is one rank of the run.

    Args:
        config: what ``load_config`` returned.
        on_step: is called after each step with its record (``StepRecord``: step, loss, lr, tgs, ...), on every rank. If it
            returns True, the run finishes the next step, saves and ends, as after SIGTERM.
        launcher: the rank of this process; None: found from the environment.
        parent: process id of the launcher; None: that of the parent process.

    Returns:
        The run folder, which ``load_model``, ``generate``, ``chat`` and ``evaluate`` take.

    Raises:
        ConfigError, DataError, UsageError, CheckpointError: if the config, the data or the folders cannot be used.
        InternEvoError: if the run fails.
    """
    expect(config, Config, "train takes the config that load_config returned")
    parent = parent or int(os.environ.get(PARENT) or os.getppid())  # read first: the launcher may end meanwhile
    info = launcher or read_launcher(os.environ)
    speaks = info.rank == 0 and PARENT not in os.environ
    opened = checked(config, info.size, speaks)
    if info.address is not None:
        faulthandler.enable()  # after a crash or SIGABRT, prints the stacks of all threads
    if speaks:
        print_notices(config)
    _run(opened, config, info, parent, speaks, on_step)
    return config.run_folder


def _run(
    config: Config, stated: Config, info: LauncherInfo, parent: int, speaks: bool,
    on_step: Callable[[StepRecord], object] | None,
) -> None:  # fmt: skip
    """Joins the other ranks, and trains.

    Args:
        config: what ``checked`` returned.
        stated: the config that is recorded.
        speaks: print that the processes are starting.
    """
    from ..parallel.world import join
    from .folder import acquire_on_rank_0
    from .process import determinism
    from .stop import StopRequests
    from .trainer import Trainer
    from .watchdog import Watchdog

    if speaks:
        say_starting(info.size)
    stops = StopRequests(parent if _ends_with_launcher(info) else None)
    if stops.is_orphan():  # before it is waited for in ``join``, with the lock of the run folder
        raise InternEvoError("the launcher has ended before the run has started; start it again")
    limit = _collective_timeout(config.monitor.timeout)
    with (
        determinism(config),
        stops.listening(),
        join(info, limit) as world,
        Watchdog(world, config.monitor.timeout) as watchdog,
        acquire_on_rank_0(config, world) as lock,
    ):
        if launcher_has_store(os.environ):
            watchdog.on_lost_store = stops.launcher_has_ended
        trainer = Trainer(config, world, stops, watchdog, lock, stated=stated)
        trainer.fit(on_step)
    if stops.cut_off and not trainer.is_complete:  # torchrun must not take this for the end of the run
        raise InternEvoError(
            f"the launcher of a rank has ended, so the run has stopped after step {trainer.state.step} of "
            f"{config.data.total_steps}; the same command continues it"
        )


def checked(config: Config, processes: int, speaks: bool) -> Config:
    """Checks that a run can be trained on this number of processes. Returns its config with a tokenizer that can be opened.

    Args:
        speaks: print a line if a tokenizer that the run does not need cannot be had.

    Raises:
        ConfigError, DataError, UsageError: as ``check`` and ``local_tokenizer``.
    """
    record = Recorded.of(config)
    opened = local_tokenizer(config, record, partial(print, file=sys.stderr) if speaks else lambda line: None)
    check(opened, processes, new=record is None)
    return opened


def _collective_timeout(step: float) -> timedelta:
    """Returns the time-out of a collective of training, longer than that of a step, so that the watchdog can say more first."""
    from ..parallel.world import TIMEOUT

    return max(TIMEOUT, timedelta(seconds=2 * step)) if step else timedelta(days=30)


def _ends_with_launcher(info: LauncherInfo) -> bool:
    """Whether the parent of this process is its launcher, and the run stops when that ends. Ranks that a shell has started with
    nohup outlive it."""
    return info.address is not None and (PARENT in os.environ or signal.getsignal(signal.SIGHUP) != signal.SIG_IGN)


def say_starting(processes: int) -> None:
    """Prints that processes are starting, which takes seconds. The run does not depend on being seen."""
    with suppress(OSError):
        os.write(1, f"starting {counted(processes, 'process')}\n".encode())


def print_notices(config: Config) -> None:
    """Prints what may surprise the author of the config: keys without an effect, in short, and keys that do not go together."""
    for line in notes(config, short=True):
        print(f"note: {line}", file=sys.stderr)
