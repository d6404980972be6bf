"""``internevo train``: checks the config, starts the processes if no launcher has, and trains."""

from __future__ import annotations

import faulthandler
import os
import sys
from datetime import timedelta
from pathlib import Path

from ..config import Config, load_config, notices
from ..train.check import check
from .launch import already_launched, default_processes, die_with_parent, launch


def train(path: Path, overrides: list[str], processes: int | None, port: int = 8888, launcher: str | None = None) -> int:
    """Trains with the config ``path``.

    Args:
        overrides: KEY.PATH=VALUE overrides of the config.
        processes: number of processes to start, if torchrun or srun has not started this one; None: one per GPU, or 1.
        port: port of the first host, under Slurm.
        launcher: "torch" or "slurm" if this process must have been started by it; None: found from the environment.

    Returns:
        The exit code.
    """
    config = load_config(path, overrides)
    if launcher is None and not already_launched():
        processes = processes or default_processes()
        check(config, processes)
        if processes > 1:
            from ..train.folder import INHERITED, acquire

            _print_notices(config)
            with acquire(config) as lock:
                variables = {INHERITED: str(lock.descriptor)}
                arguments = ["train", str(path), *overrides]
                return launch(arguments, processes, config.run_folder / "log", variables, (lock.descriptor,))
    return _train_here(config, port, launcher)


def _collective_timeout(step: float) -> timedelta:
    """Returns the time-out of a collective of training, longer than that of a step, so that the watchdog can say more first."""
    from ..parallel.world import TIMEOUT

    return max(TIMEOUT, timedelta(seconds=2 * step)) if step else timedelta(days=30)


def _train_here(config: Config, port: int, launcher: str | None) -> int:
    from ..parallel.world import join, read_launcher
    from ..train.folder import acquire_on_rank_0
    from ..train.stop import StopRequests
    from ..train.trainer import Trainer
    from ..train.watchdog import Watchdog

    die_with_parent()
    if already_launched():
        faulthandler.enable()  # after a crash or SIGABRT, prints the stacks of all threads
    info = read_launcher(os.environ, port, launcher)
    check(config, info.size)
    if info.rank == 0 and "INTERNEVO_PARENT" not in os.environ:
        _print_notices(config)
    stops = StopRequests()
    limit = _collective_timeout(config.monitor.timeout)
    with (
        stops.listening(),
        join(port, launcher, limit) as world,
        Watchdog(world, config.monitor.timeout) as watchdog,
        acquire_on_rank_0(config, world) as lock,
    ):
        Trainer(config, world, stops, watchdog, lock).fit()
    return 0


def _print_notices(config: Config) -> None:
    """Prints a line for each config key that has no effect."""
    for line in notices(config):
        print(f"note: {line}", file=sys.stderr)
