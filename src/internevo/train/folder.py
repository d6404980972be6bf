"""The run folder, before anything is written to it: whether this run may use it, and a lock so that no other run does."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from pathlib import Path

from ..checkpoint.folder import CHECKPOINTS, SNAPSHOTS, checkpoints_of_one_run, complete_checkpoints
from ..config import Config
from ..errors import InternEvoError, UsageError
from ..parallel.world import World
from ..storage.lock import FileLock
from .stop import check_stop_file

LOCK = "internevo.lock"
"""The lock file in a run folder."""
INHERITED = "INTERNEVO_LOCK"
"""Environment variable with the file descriptor of the lock that the launcher has acquired for rank 0."""
DRY_RUN = "dryrun.json"
"""What a dry run writes, into a folder that need not be a run's yet."""
FINETUNE, CONFIG = "finetune.json", "config.py"
"""What ``internevo finetune`` writes into its run folder: its options, which are there first; and the config of the run."""
FOLDERS, FILES = (
    ("log", CHECKPOINTS, SNAPSHOTS, "tensorboard"),
    ("config.json", "metrics.jsonl", "samples.jsonl", "events.jsonl", "report.html"),
)
"""What each run writes to. (An export of a model to ``hf/`` may fail.)"""
OUTPUT = (".out", ".err", ".log")
"""Suffixes of files to which Slurm or the shell may write what a run prints. A run writes no such file next to them."""
OTHER_FOLDER = "choose another folder (ckpt.save_ckpt_folder)"


def acquire(config: Config) -> FileLock:
    """Acquires the run folder for this process. Everything that can be wrong with it is checked before anything is written.

    Raises:
        UsageError: if another run uses the folder, or it is not a run's, or the checkpoints in it are another run's, or the
            stop file is some other file.
    """
    run, stop = config.run_folder, config.ckpt.stop_file_path
    try:
        _check_content(run)
        if stop:
            check_stop_file(Path(stop))
        run.mkdir(parents=True, exist_ok=True)
        lock = FileLock.acquire(run / LOCK, say=lambda line: print(line, file=sys.stderr))
    except OSError as error:
        raise UsageError(f"the run folder {run} cannot be used: {error}; {OTHER_FOLDER}") from error
    try:
        _check_checkpoints(config, run)  # only now, because no other run changes them any more
    except BaseException:
        lock.release()
        raise
    return lock


def acquire_on_rank_0(config: Config, world: World) -> FileLock | nullcontext[None]:
    """Acquires the run folder for a run of several ranks: rank 0 has the lock. Every rank must call it.

    Raises:
        UsageError: on every rank, if the folder cannot be used.
    """
    inherited = os.environ.pop(INHERITED, None)
    if world.rank > 0:
        if refusal := world.store.get("run folder").decode():
            raise UsageError(refusal)
        return nullcontext()
    refusal = ""
    try:
        return FileLock.inherit(config.run_folder / LOCK, int(inherited)) if inherited else acquire(config)
    except InternEvoError as error:
        refusal = str(error)
        raise
    finally:
        world.store.set("run folder", refusal)


def _check_content(run: Path) -> None:
    """Checks that the folder is empty, or a run's."""
    if not os.path.lexists(run):
        return
    if not run.is_dir():
        raise UsageError(f"the run folder {run} is not a folder; {OTHER_FOLDER}")
    entries = sorted(e.name for e in run.iterdir() if not _is_harmless(e))
    if entries and not _is_run(run):
        more = f" and {len(entries) - 5} more" if len(entries) > 5 else ""
        raise UsageError(
            f"{run} is not a run folder: it contains {', '.join(entries[:5])}{more}, and no run has written to it. A run "
            f"folder must be new, empty, or that of a run; {OTHER_FOLDER}"
        )
    wrong = [e for e in FOLDERS if os.path.lexists(run / e) and not (run / e).is_dir()]
    wrong += [e for e in FILES if os.path.lexists(run / e) and not (run / e).is_file()]
    if wrong:
        kind = "folder" if wrong[0] in FOLDERS else "file"
        raise UsageError(f"{run / wrong[0]} is not a {kind}, and the run writes to a {kind} of this name; move it away")


def _is_harmless(entry: Path) -> bool:
    """Whether an entry of a folder says nothing about what the folder is for: hidden, printed by launchers, of dry runs."""
    return entry.name.startswith(".") or entry.name in ("lost+found", DRY_RUN) or (entry.suffix in OUTPUT and entry.is_file())


def _is_run(run: Path) -> bool:
    """Whether a run has written to the folder. (Runs of older versions have not left a lock file.)"""
    return (
        any((run / name).is_file() for name in (LOCK, FINETUNE))
        or any((run / "log").glob("rank-[0-9]*"))
        or bool(complete_checkpoints(run))
    )


def _check_checkpoints(config: Config, run: Path) -> None:
    """Checks that all checkpoints in the folder are of one run, and that this run continues it."""
    checkpoints = checkpoints_of_one_run(run)
    if checkpoints and not (config.ckpt.auto_resume and config.ckpt.enable_save_ckpt):
        key = "ckpt.auto_resume" if config.ckpt.enable_save_ckpt else "ckpt.enable_save_ckpt"
        raise UsageError(
            f"{run} contains the checkpoints of another run, the newest in {checkpoints[0]}, and with {key}=False this run "
            "does not continue it. Give this run another folder (ckpt.save_ckpt_folder); there it can start from a checkpoint "
            f"of the other run with ckpt.load_ckpt_info.path={checkpoints[0]}"
        )
