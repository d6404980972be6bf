"""Saves checkpoints in the background: copies tensors to host memory, writes files, then the manifest, and renames the folder.

A checkpoint is written to ``.NAME.tmp`` and renamed when it is complete. If a process is killed meanwhile, the folder that it
leaves is not used as a checkpoint.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse

from .. import __version__
from ..config.run import Ckpt
from ..errors import CheckpointError, InternEvoError
from ..observe.record import SaveRecord
from ..storage.folders import set_aside, shared_temporary
from .finish import Extras, complete
from .folder import CHECKPOINTS, SNAPSHOTS, checkpoint_name, saved_checkpoints
from .manifest import NAME, FileEntry, Head, Manifest, TensorEntry
from .staging import own_share
from .storage import SafetensorsWriter

log = logging.getLogger("internevo")
PATIENCE = 600.0
"""Seconds that a failed run waits for a save that has been started."""


class Saver:
    """Saves the checkpoints of a run, one at a time. All ranks must call its methods in the same order, except ``finish``.

    Two threads use the group: the background thread of a save, and the thread that starts the next save. Their collectives do
    not mix: on each rank a save starts only after the previous one, with all its collectives, has ended.
    """

    def __init__(
        self,
        run: Path,
        config: Ckpt,
        rank: int,
        layout: dict[str, int],
        group: dist.ProcessGroup,
        after: Callable[[Path], None] = lambda folder: None,
        identity: str = "",
        stager: AsyncStager | None = None,
    ) -> None:
        """
        Args:
            run: the run folder.
            config: ``ckpt``.
            layout: axis -> size, for the manifest.
            group: a group of all ranks for CPU tensors that nothing else uses.
            after: is called with each complete checkpoint, on rank 0 and in the background.
            identity: of the run, for the manifest. Only checkpoints with it are ever deleted or replaced.
            stager: copies the tensors (``stager_for``). It may still do so when ``save`` has returned: call ``wait_for_copies``
                before they change.
        """
        self.run, self.config, self.rank, self.layout, self.group, self.after = run, config, rank, layout, group, after
        self.identity, self.stager = identity, stager
        self.copying: Future[None] | None = None
        self.pending: Future[Any] | None = None
        self.temporary = run / "none"
        self.snapshots = 0
        self.seconds: float | None = None
        """How long the last save took."""
        self._saved: list[SaveRecord] = []
        self._whole: set[int] = set()
        """Steps of checkpoints whose manifest is known to be whole."""

    def save(self, step: int, tensors: dict[str, Tensor], extras: Extras, keep_all: bool = False) -> None:
        """Copies ``tensors`` (KIND/NAME -> DTensor) to host memory, and writes them in the background. They may change after
        ``wait_for_copies``.

        Args:
            keep_all: delete no older checkpoint after this one.
        """
        self._start(self.run / CHECKPOINTS / checkpoint_name(step), step, tensors, extras, keep_all)

    def snapshot(self, step: int, tensors: dict[str, Tensor], extras: Extras) -> None:
        """Does the same with one of the two snapshot folders, alternately."""
        folder = self.run / SNAPSHOTS / str(self.snapshots % 2)
        self.snapshots += 1
        self._start(folder, step, tensors, extras, keep_all=True)

    def _start(self, folder: Path, step: int, tensors: dict[str, Tensor], extras: Extras, keep_all: bool) -> None:
        self.wait()  # a stager copies into the same memory again
        begin = time.monotonic()
        temporary = self.temporary = shared_temporary(folder)
        if self.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        dist.barrier(group=self.group)

        def on_written(entries: dict[str, TensorEntry], files: dict[str, FileEntry]) -> None:
            versions = {"internevo": __version__, "torch": torch.__version__}
            manifest = Manifest(step, self.layout, versions, files, entries, self.identity)
            self._protect(folder)
            complete(temporary, folder, manifest, extras)
            nbytes = sum(file.size for file in manifest.files.values())
            seconds, snapshot = time.monotonic() - begin, folder.parent.name == SNAPSHOTS
            self._saved.append(SaveRecord(step, folder, nbytes, seconds, snapshot, time.time()))
            if not keep_all:
                self._retain(step)
            self.after(folder)

        writer = SafetensorsWriter(temporary, self.rank, on_written)
        pending = dcp.async_save(own_share(tensors), storage_writer=writer, process_group=self.group, async_stager=self.stager)
        if isinstance(pending, AsyncSaveResponse):
            self.copying, pending = pending.staging_completion, pending.upload_completion
        pending.add_done_callback(lambda _: setattr(self, "seconds", time.monotonic() - begin))
        self.pending = pending

    def wait_for_copies(self) -> None:
        """Waits until the tensors of the last save have been copied. If that fails, so does the save (``check``)."""
        if self.copying is not None:
            wait([self.copying])
            self.copying = None

    def take_saved(self) -> list[SaveRecord]:
        """Returns what has been saved since the last call, on rank 0."""
        return [self._saved.pop(0) for _ in range(len(self._saved))]  # meanwhile, the background thread may add one

    def check(self) -> None:
        """Raises the error of a background save if it has failed. Does not wait for one that is running."""
        if self.pending is not None and self.pending.done():
            self.wait()

    def wait(self) -> None:
        """Waits for the save that is running, and raises its error if it fails. Ctrl-C ends the waiting, but not the save."""
        if self.pending is None:
            return
        wait([self.pending])
        pending, self.pending = self.pending, None
        error = pending.exception()
        if error is not None:
            if self.rank == 0:
                shutil.rmtree(self.temporary, ignore_errors=True)
            raise CheckpointError(f"saving a checkpoint failed; earlier ones are untouched: {_reason(error)}") from error

    def close(self) -> None:
        """Waits as ``wait``, and frees the memory of the copies. Nothing can be saved after it."""
        self.wait()
        if self.stager is not None:
            self.stager.close()

    def finish(self, patience: float = PATIENCE) -> None:
        """Waits for the save that is running after the run has failed on this rank. It may still become a complete checkpoint.

        It waits at most ``patience`` seconds, because ranks that the save needs may have ended. It only logs errors, because
        the run has already failed.
        """
        pending = self.pending  # read once: another thread may be in wait()
        if pending is None:
            return
        log.info(f"waiting up to {patience:.0f} s for the checkpoint that is being saved")
        if not wait([pending], patience).done:
            log.warning(f"the checkpoint that was being saved is not complete after {patience:.0f} s, and is abandoned")
        elif (error := pending.exception()) is not None:
            log.warning(f"saving the checkpoint failed as well: {_reason(error)}")

    def _protect(self, folder: Path) -> None:
        """Gives what is in the place of a new checkpoint another name, unless it is an earlier checkpoint of this run."""
        if not os.path.lexists(folder):
            return
        try:
            there = Head.read(folder)
            step = checkpoint_name(there.step) if folder.parent.name == CHECKPOINTS else folder.name
            mine = there.run == self.identity and step == folder.name
        except CheckpointError:
            mine = False
        if not mine:
            log.warning(f"{folder} is not a checkpoint of this run, and is now named {set_aside(folder).name}")

    def _retain(self, step: int) -> None:
        """Deletes those checkpoints from before ``step`` that ``keep_last`` and ``keep_every`` do not keep."""
        last, every = self.config.keep_last, self.config.keep_every
        self._whole.add(step)
        if last is None:
            return
        kept = 1  # this one
        for old, folder in reversed(saved_checkpoints(self.run, self.identity).items()):
            if old >= step:
                continue
            if kept < last:
                kept += self._is_whole(old, folder)
            elif not (every and old % every == 0):
                # The manifest is deleted first, so that a folder that is only partly deleted is not a complete checkpoint.
                (folder / NAME).unlink(missing_ok=True)
                shutil.rmtree(folder, ignore_errors=True)

    def _is_whole(self, step: int, folder: Path) -> bool:
        """Whether a checkpoint can be read. One that cannot takes no other's place."""
        if step not in self._whole:
            try:
                Manifest.read(folder)
            except CheckpointError:
                return False
            self._whole.add(step)
        return True


def _reason(error: BaseException) -> str:
    """Returns the message of the error that DCP has wrapped in its own, if it is one of ours."""
    failures = getattr(error, "failures", None) or {}
    for inner, *_ in failures.values():
        if isinstance(inner, InternEvoError | OSError):
            return str(inner)
    return str(error) or type(error).__name__
