"""What is copied to host memory when a checkpoint is saved, and how: the state changes again while it is written."""

from __future__ import annotations

import math
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.staging import AsyncStager, DefaultStager, StagingOptions
from torch.distributed.tensor import DTensor


def stager_for(device: torch.device) -> AsyncStager | None:
    """Returns what copies the state of a run on a device; None: PyTorch's plain copies, for which the step that saves waits.

    On a CPU these take no longer than a copy must.
    """
    return PinnedStager() if device.type == "cuda" else None


class PinnedStager(DefaultStager):
    """Copies from a GPU while it goes on computing: on a stream of its own, started by a thread, into pinned memory.

    Pinning takes longer than copying, so the memory is kept for the next save. That must start only when this one is written.
    """

    def __init__(self) -> None:
        # Memory is shared only with a process that writes, and containers have little of it: a thread writes here.
        super().__init__(StagingOptions(use_shared_memory=False))

    def stage(self, state_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any] | Future[dict[str, Any]]:
        """Starts copying. The result must be waited for before the state changes."""
        torch.accelerator.synchronize()  # the stream of the copies doesn't wait for an update that is still running
        return super().stage(state_dict, **kwargs)


def own_share(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leaves out what another rank saves that has the same shards, so that this rank need not copy it.

    Ranks with the same shards have them in the same order. So without a message they agree on who saves which: each about the
    same number of bytes. (What several ranks save nevertheless, PyTorch's planner leaves to one of them.)
    """
    loads: dict[Any, list[int]] = {}  # (a mesh, its dimensions along which shards are the same) -> bytes of each such rank
    own = {}
    for name, tensor in tensors.items():
        coordinate = tensor.device_mesh.get_coordinate() if isinstance(tensor, DTensor) else None
        if not isinstance(tensor, DTensor) or coordinate is None:
            own[name] = tensor
            continue
        mesh, me = tensor.device_mesh, 0
        dims = tuple(dim for dim, placement in enumerate(tensor.placements) if placement.is_replicate())
        for dim in dims:
            me = me * mesh.size(dim) + coordinate[dim]
        load = loads.setdefault((mesh, dims), [0] * math.prod(mesh.size(dim) for dim in dims))
        least = load.index(min(load))
        load[least] += tensor.to_local().nbytes
        if least == me:
            own[name] = tensor
    return own
