"""This rank's shard of a tensor: where it is in the full tensor, and how it is filled."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from ..models.init import BLOCK, Initializer


def local(tensor: Tensor) -> Tensor:
    """Returns this rank's shard of a DTensor, and any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_dim_of_experts(shape: Sequence[int], ranks: int) -> int:
    """Returns the dimension along which the weights [experts, out, in] of a rank's experts are sharded: the experts, if the
    ranks get the same number of them, else the rows of each expert, if that divides them evenly."""
    return 1 if shape[0] % ranks and shape[1] % ranks == 0 else 0


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
    part, columns = local(parameter), tuple(slice(a, b) for a, b in others)
    # A few blocks of random numbers at a time: the full tensor, of which this rank may have some columns, can be large.
    step = 16 * max(1, BLOCK // max(1, math.prod(parameter.shape[1:])))
    for first in range(start - start % step, stop, step) if part.numel() else ():
        a, b = max(start, first), min(stop, first + step)
        part[a - start : b - start].copy_(values(a, b)[(slice(None), *columns)])


def local_box(parameter: Tensor) -> list[tuple[int, int]]:
    """Returns (start, stop) of this rank's shard along every dimension of the full tensor.

    Each dimension of the mesh divides a dimension of the tensor as ``torch.chunk`` does. If several divide the same one, the
    first dimension of the mesh does so first, unless its shards are strided: those divide what the later ones have left
    (``fully_shard`` shards what a tensor mode has sharded before).
    """
    box = [(0, size) for size in parameter.shape]
    if not isinstance(parameter, DTensor):
        return box
    mesh, coordinate = parameter.device_mesh, parameter.device_mesh.get_coordinate()
    assert coordinate is not None
    sharded = {n: placement for n, placement in enumerate(parameter.placements) if hasattr(placement, "dim")}
    plain = [n for n, placement in sharded.items() if type(placement) is Shard]
    strided = [n for n in reversed(sharded) if n not in plain]
    for mesh_dim in plain + strided:
        dim = sharded[mesh_dim].dim
        box[dim] = chunk(box[dim], mesh.size(mesh_dim), coordinate[mesh_dim])
    return box


def chunk(span: tuple[int, int], number: int, place: int) -> tuple[int, int]:
    """Returns (start, stop) of a chunk of another (start, stop), as ``torch.chunk`` divides it; empty after the last chunk."""
    start, stop = span
    step = -(-(stop - start) // number)
    first = min(start + place * step, stop)
    return first, min(first + step, stop)
