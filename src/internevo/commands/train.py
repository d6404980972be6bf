"""``internevo train``: checks the config, starts the processes if no launcher has, and trains."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

from ..config import Config, notices
from ..errors import InternEvoError, UsageError
from ..parallel.launcher import LauncherInfo, launcher_has_store, read_launcher
from ..train.check import check, check_config
from ..train.config import load_config
from .launch import PARENT, default_processes, launch, say_starting


def train(path: Path, overrides: list[str], processes: int | None, port: int | None = None, launcher: str | None = None) -> int:
    """Trains with the config ``path``.

    Args:
        overrides: KEY.PATH=VALUE overrides of the config.
        processes: number of processes to start, if torchrun or srun has not started this one; None: one per GPU, or 1.
        port: as in ``read_launcher``.
        launcher: "torch" or "slurm" if this process must have been started by it; None: found from the environment.

    Returns:
        The exit code.
    """
    parent = int(os.environ.get(PARENT) or os.getppid())  # read first: the launcher may end meanwhile
    config = load_config(path, overrides, to_train=True)
    info = read_launcher(os.environ, port, launcher)
    if info.address is None:
        processes = processes or default_processes()
        check(config, processes)
        if processes > 1:
            from ..train.folder import INHERITED, acquire
            from ..train.start import check_start

            _print_notices(config)
            with acquire(config) as lock:
                check_start(config)
                variables = {INHERITED: str(lock.descriptor)}
                arguments = ["train", str(path), *overrides]
                return launch(arguments, processes, config.run_folder / "log", variables, (lock.descriptor,))
    elif processes not in (None, info.size):
        raise UsageError(
            f"--nproc {processes}: a launcher has started this process as rank {info.rank} of {info.size}, as its environment "
            "variables say (RANK, SLURM_STEP_ID): leave out --nproc"
        )
    else:
        check(config, info.size)
    return _train_here(config, info, parent)


def dry_run(path: Path, overrides: list[str], world_size: int, rank: int) -> None:
    """Takes one step of a rank of ``world_size`` ranks without computing. Prints what it has counted, and writes it to
    ``dryrun.json`` in the run folder. The data need not be here.

    Raises:
        UsageError: if there is no such rank, or the file is not from a dry run.
        ConfigError: if the config cannot be trained on ``world_size`` processes.
    """
    if rank >= world_size:
        raise UsageError(f"--rank {rank}: the ranks of --world-size {world_size} are 0 to {world_size - 1}")
    config = load_config(path, overrides)
    check_config(config, world_size)
    _print_notices(config)
    if config.model.compile:
        print("note: model.compile: a dry run counts layers that are not compiled", file=sys.stderr)
    if config.ckpt.load_ckpt_info is not None:
        print("note: ckpt.load_ckpt_info: a dry run reads no checkpoint", file=sys.stderr)
    from ..planner import dryrun

    dryrun.check_file(config.run_folder)
    result = dryrun.dry_run(config, world_size, rank)
    print("\n".join(result.lines()))
    print(f"written to {result.write(config.run_folder)}")


def _collective_timeout(step: float) -> timedelta:
    """Returns the time-out of a collective of training, longer than that of a step, so that the watchdog can say more first."""
    from ..parallel.world import TIMEOUT

    return max(TIMEOUT, timedelta(seconds=2 * step)) if step else timedelta(days=30)


def _train_here(config: Config, info: LauncherInfo, parent: int) -> int:
    from ..parallel.world import join
    from ..train.folder import acquire_on_rank_0
    from ..train.stop import StopRequests
    from ..train.trainer import Trainer
    from ..train.watchdog import Watchdog

    if info.address is not None:
        faulthandler.enable()  # after a crash or SIGABRT, prints the stacks of all threads
    if info.rank == 0 and PARENT not in os.environ:
        _print_notices(config)
        say_starting(info.size)
    stops = StopRequests(parent if _ends_with_launcher(info) else None)
    if stops.is_orphan():  # before it is waited for in ``join``, with the lock of the run folder
        raise InternEvoError("the launcher has ended before the run has started; start it again")
    limit = _collective_timeout(config.monitor.timeout)
    with (
        stops.listening(),
        join(info, limit) as world,
        Watchdog(world, config.monitor.timeout) as watchdog,
        acquire_on_rank_0(config, world) as lock,
    ):
        if launcher_has_store(os.environ):
            watchdog.on_lost_store = stops.launcher_has_ended
        trainer = Trainer(config, world, stops, watchdog, lock)
        trainer.fit()
    if stops.cut_off and trainer.state.step < config.data.total_steps:  # torchrun must not take this for the end of the run
        raise InternEvoError(
            f"the launcher of a rank has ended, so the run has stopped after step {trainer.state.step} of "
            f"{config.data.total_steps}; the same command continues it"
        )
    return 0


def _ends_with_launcher(info: LauncherInfo) -> bool:
    """Whether the parent of this process is its launcher, and the run stops when that ends. Ranks that a shell has started with
    nohup outlive it."""
    return info.address is not None and (PARENT in os.environ or signal.getsignal(signal.SIGHUP) != signal.SIG_IGN)


def _print_notices(config: Config) -> None:
    """Prints a line for each config key that has no effect."""
    for line in notices(config):
        print(f"note: {line}", file=sys.stderr)
