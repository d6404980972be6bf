"""This rank's shard of a tensor: where it is in the full tensor, and how it is filled."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..models.init import Initializer


def local(tensor: Tensor) -> Tensor:
    """Returns this rank's shard of a DTensor, and any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def initialize(masters: dict[str, nn.Parameter], initializer: Initializer) -> None:
    """Fills this rank's shard of every weight with its initial values."""
    for name, parameter in masters.items():
        fill_local(parameter, partial(initializer.rows, name, parameter.shape))


@torch.no_grad()
def fill_local(parameter: nn.Parameter, values: Callable[[int, int], Tensor]) -> None:
    """Fills this rank's shard of a weight.

    Args:
        values: ``values(start, stop)`` returns the full tensor's slice [start:stop] along dimension 0.
    """
    (start, stop), *others = local_box(parameter)
    part = local(parameter)
    if part.numel():
        part.copy_(values(start, stop)[(slice(None), *(slice(a, b) for a, b in others))])


def local_box(parameter: Tensor) -> list[tuple[int, int]]:
    """Returns (start, stop) of this rank's shard along every dimension of the full tensor.

    The last dimension of the mesh shards the tensor first; each dimension before it shards what the ones after it have left.
    Each of them divides a tensor dimension as ``torch.chunk`` does.
    """
    box = [(0, size) for size in parameter.shape]
    if not isinstance(parameter, DTensor):
        return box
    mesh, coordinate = parameter.device_mesh, parameter.device_mesh.get_coordinate()
    assert coordinate is not None
    for mesh_dim in reversed(range(mesh.ndim)):
        dim = getattr(parameter.placements[mesh_dim], "dim", None)  # all kinds of shards have it
        if dim is not None:
            start, stop = box[dim]
            step = -(-(stop - start) // mesh.size(mesh_dim))
            first = min(start + coordinate[mesh_dim] * step, stop)
            box[dim] = (first, min(first + step, stop))
    return box
