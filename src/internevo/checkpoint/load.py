"""Loads a checkpoint into a model of any layout."""

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
    """Fills ``tensors`` (KIND/NAME -> DTensor) in place. Each rank reads its own shards. Every rank must call it.

    Raises:
        CheckpointError: on every rank, if a file is damaged, or a tensor is missing or has another shape.
    """
    check_on_all_ranks(lambda: _check(checkpoint, tensors))
    reader = SafetensorsReader(checkpoint.folder, checkpoint.manifest)
    dcp.load(tensors, storage_reader=reader)


def _check(checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> None:
    stored = checkpoint.manifest.tensors
    for name, tensor in tensors.items():
        if name not in stored:
            raise CheckpointError(f"{checkpoint.folder} has no tensor {name!r}: it is a checkpoint of another model")
        if list(tensor.shape) != stored[name].shape:
            raise CheckpointError(
                f"{checkpoint.folder}: {name} has shape {stored[name].shape}, and in the config's model {list(tensor.shape)}"
            )
    # Each rank verifies its share of the files, so that every file is read once.
    names = sorted(checkpoint.manifest.files)
    verify(checkpoint.folder, names[dist.get_rank() :: dist.get_world_size()], checkpoint.manifest)


def check_on_all_ranks(check: Callable[[], None]) -> None:
    """Runs ``check`` on every rank. If it fails on any rank, raises the error on all ranks, so that none waits for another."""
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
