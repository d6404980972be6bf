"""Saving in the background: a copy in host memory, then files, then the manifest, then the folder's name.

A checkpoint is written to ``.NAME.tmp`` and renamed when it is whole, so that a process killed at any moment leaves at
most a folder that nobody takes for a checkpoint.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from .. import __version__
from ..config.run import Ckpt
from ..errors import CheckpointError, InternEvoError
from ..storage.folders import shared_temporary
from .finish import Extras, complete
from .folder import CHECKPOINTS, SNAPSHOTS, checkpoint_name
from .manifest import NAME, FileEntry, Manifest, TensorEntry
from .storage import SafetensorsWriter

PATIENCE = 600.0
"""Seconds that a run which has failed waits for the save under way."""


class Saver:
    """Saves checkpoints of a run, one at a time. Every rank calls every method alike, ``finish`` excepted.

    Two threads use the group: the background thread of a save, and the one that starts the next save. They take turns, in the
    same order on every rank: a save only starts when the one before has ended here, that is, when all of its collectives have.
    """

    def __init__(
        self,
        run: Path,
        config: Ckpt,
        rank: int,
        layout: dict[str, int],
        group: dist.ProcessGroup,
        after: Callable[[Path], None] = lambda folder: None,
    ) -> None:
        """
        Args:
            layout: sizes of the axes, for the manifest.
            group: all ranks, on the CPU, and used for nothing else.
            after: called on rank 0, in the background, with each checkpoint that is complete.
        """
        self.run, self.config, self.rank, self.layout, self.group, self.after = run, config, rank, layout, group, after
        self.pending: Future[Any] | None = None
        self.temporary = run / "none"
        self.snapshots = 0

    def save(self, step: int, tensors: dict[str, Tensor], extras: Extras) -> None:
        """Copies ``tensors`` (KIND/NAME -> DTensor) to host memory and goes on in the background."""
        self._start(self.run / CHECKPOINTS / checkpoint_name(step), step, tensors, extras)

    def snapshot(self, step: int, tensors: dict[str, Tensor], extras: Extras) -> None:
        """The same into one of two folders in turn."""
        folder = self.run / SNAPSHOTS / str(self.snapshots % 2)
        self.snapshots += 1
        self._start(folder, step, tensors, extras)

    def _start(self, folder: Path, step: int, tensors: dict[str, Tensor], extras: Extras) -> None:
        self.wait()
        temporary = self.temporary = shared_temporary(folder)
        if self.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        dist.barrier(group=self.group)

        def on_written(entries: dict[str, TensorEntry], files: dict[str, FileEntry]) -> None:
            versions = {"internevo": __version__, "torch": torch.__version__}
            manifest = Manifest(step, self.layout, versions, files, entries)
            complete(temporary, folder, manifest, extras)
            self._retain()
            self.after(folder)

        writer = SafetensorsWriter(temporary, self.rank, on_written)
        pending = dcp.async_save(tensors, storage_writer=writer, process_group=self.group)
        assert isinstance(pending, Future)
        self.pending = pending

    def check(self) -> None:
        """Raises the error of a background save that has failed, without waiting for one under way."""
        if self.pending is not None and self.pending.done():
            self.wait()

    def wait(self) -> None:
        """Waits for the save under way; raises its error. Ctrl-C ends the waiting, not the save."""
        if self.pending is None:
            return
        wait([self.pending])
        pending, self.pending = self.pending, None
        error = pending.exception()
        if error is not None:
            if self.rank == 0:
                shutil.rmtree(self.temporary, ignore_errors=True)
            raise CheckpointError(f"saving a checkpoint failed; earlier ones are untouched: {_reason(error)}") from error

    def finish(self, patience: float = PATIENCE) -> None:
        """After the run has failed on this rank: waits for the save under way, which may still become a good checkpoint.

        It waits at most ``patience`` seconds, because ranks that the save needs may be gone. It only logs errors, because the
        run has already failed.
        """
        pending = self.pending  # read once: another thread may be in wait()
        if pending is None:
            return
        log = logging.getLogger("internevo")
        log.info(f"waiting up to {patience:.0f} s for the checkpoint under way")
        if not wait([pending], patience).done:
            log.warning(f"the checkpoint under way was given up after {patience:.0f} s")
        elif (error := pending.exception()) is not None:
            log.warning(f"the checkpoint under way failed as well: {_reason(error)}")

    def _retain(self) -> None:
        """Deletes checkpoints that ``keep_last`` and ``keep_every`` do not keep, on rank 0 after a new one is complete."""
        if self.config.keep_last is None:
            return
        folders = sorted((self.run / CHECKPOINTS).glob("step-????????"))
        every = self.config.keep_every
        for folder in folders[: -self.config.keep_last]:
            if not (every and int(folder.name.removeprefix("step-")) % every == 0):
                # The manifest goes first: a half-deleted folder must not look whole.
                (folder / NAME).unlink(missing_ok=True)
                shutil.rmtree(folder, ignore_errors=True)


def _reason(error: BaseException) -> str:
    """The message of our own error inside DCP's wrapping, when there is one."""
    failures = getattr(error, "failures", None) or {}
    for inner, *_ in failures.values():
        if isinstance(inner, InternEvoError | OSError):
            return str(inner)
    return str(error) or type(error).__name__
