"""``internevo train``: checks the config, starts the processes if no launcher has, and trains."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from ..errors import UsageError
from ..parallel.launcher import PARENT, read_launcher
from ..train import run
from ..train.check import check_config
from ..train.config import load_config
from .launch import default_processes, launch


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
    config = load_config(path, overrides)
    info = read_launcher(os.environ, port, launcher)
    if info.address is None:
        processes = processes or default_processes()
        if processes > 1:
            from ..train.folder import INHERITED, acquire
            from ..train.start import check_start

            run.checked(config, processes, speaks=True)
            run.print_notices(config)
            with acquire(config) as lock:
                check_start(config)
                variables = {INHERITED: str(lock.descriptor)}
                arguments = ["train", str(path), *overrides]
                run.say_starting(processes)
                return launch(arguments, processes, config.run_folder / "log", variables, (lock.descriptor,))
    elif processes not in (None, info.size):
        raise UsageError(
            f"--nproc {processes}: a launcher has started this process as rank {info.rank} of {info.size}, as its environment "
            "variables say (RANK, SLURM_STEP_ID): leave out --nproc"
        )
    run.train(config, launcher=info, parent=parent)
    return 0


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
    run.print_notices(config)
    if config.model.compile:
        print("note: model.compile: a dry run counts layers that are not compiled", file=sys.stderr)
    if config.ckpt.load_ckpt_info is not None:
        print("note: ckpt.load_ckpt_info: a dry run reads no checkpoint", file=sys.stderr)
    from ..planner import dryrun

    dryrun.check_file(config.run_folder)
    result = dryrun.dry_run(config, world_size, rank)
    print("\n".join(result.lines()))
    print(f"written to {result.write(config.run_folder)}")
