"""Loading a checkpoint into a running model of any layout."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from ..errors import CheckpointError
from .folder import Checkpoint
from .manifest import verify
from .storage import SafetensorsReader


def load_tensors(checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> None:
    """Fills ``tensors`` (KIND/NAME -> DTensor) in place, each rank reading its own part. Every rank calls it.

    Raises:
        CheckpointError: on every rank, when a file is damaged or a tensor is missing or has another shape.
    """
    agree(lambda: _check(checkpoint, tensors))
    reader = SafetensorsReader(checkpoint.folder, checkpoint.manifest)
    dcp.load(tensors, storage_reader=reader)


def _check(checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> None:
    stored = checkpoint.manifest.tensors
    for name, tensor in tensors.items():
        if name not in stored:
            raise CheckpointError(f"{checkpoint.folder} has no tensor {name!r}: it is of another model")
        if list(tensor.shape) != stored[name].shape:
            raise CheckpointError(
                f"{checkpoint.folder}: {name} has shape {stored[name].shape}, and the config's model {list(tensor.shape)}"
            )
    # Each rank checks its share of the files, so that the whole is read once.
    names = sorted(checkpoint.manifest.files)
    verify(checkpoint.folder, names[dist.get_rank() :: dist.get_world_size()], checkpoint.manifest)


def agree(check: Callable[[], None]) -> None:
    """Runs ``check`` on every rank and raises the first rank's error on all, so that none waits for one that failed."""
    message: str | None = None
    try:
        check()
    except CheckpointError as error:
        message = str(error)
    if dist.get_world_size() > 1:
        messages: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(messages, message)
        message = next((m for m in messages if m), None)
    if message:
        raise CheckpointError(message)
