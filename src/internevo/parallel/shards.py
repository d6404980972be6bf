"""This rank's part of a tensor that is spread over ranks: where it lies in the full tensor, and how it is filled."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..models.init import Initializer


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor that may be spread over ranks."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def initialize(masters: dict[str, nn.Parameter], initializer: Initializer) -> None:
    """Fills every weight with this rank's part of its initial value."""
    for name, parameter in masters.items():
        fill_local(parameter, partial(initializer.rows, name, parameter.shape))


@torch.no_grad()
def fill_local(parameter: nn.Parameter, values: Callable[[int, int], Tensor]) -> None:
    """Fills this rank's part of a weight from ``values(start, stop)``, the full tensor's slices along its first axis."""
    (start, stop), *others = local_box(parameter)
    part = local(parameter)
    if part.numel():
        part.copy_(values(start, stop)[(slice(None), *(slice(a, b) for a, b in others))])


def local_box(parameter: Tensor) -> list[tuple[int, int]]:
    """(start, stop) of this rank's part along every axis of the full tensor.

    Inner dimensions of the mesh have cut first, outer ones what was left; each as ``torch.chunk`` does.
    """
    box = [(0, size) for size in parameter.shape]
    if not isinstance(parameter, DTensor):
        return box
    mesh, coordinate = parameter.device_mesh, parameter.device_mesh.get_coordinate()
    assert coordinate is not None
    for dim in reversed(range(mesh.ndim)):
        axis = getattr(parameter.placements[dim], "dim", None)  # of every kind of shard
        if axis is not None:
            start, stop = box[axis]
            step = -(-(stop - start) // mesh.size(dim))
            first = min(start + coordinate[dim] * step, stop)
            box[axis] = (first, min(first + step, stop))
    return box
