"""Views: ways to arrange the ranks of the world into named axes; and the process groups and meshes that belong to them.

A view is arithmetic, and can be tested without processes. ``Groups`` makes the process groups. A group that several views have
is made once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh


class View:
    """The ranks of the world as an array with named axes. Neighbouring ranks differ in the last axis.

    >>> View({"data": 2, "tensor": 4}).coordinate(6)
    {'data': 1, 'tensor': 2}
    """

    def __init__(self, axes: Mapping[str, int]) -> None:
        """``axes``: name -> number of ranks along that axis."""
        self.axes = dict(axes)

    @property
    def world(self) -> int:
        """The number of ranks."""
        return math.prod(self.axes.values())

    def stride(self, axis: str) -> int:
        """Returns the difference between the numbers of two ranks that are neighbours along ``axis``."""
        sizes = list(self.axes.values())
        return math.prod(sizes[list(self.axes).index(axis) + 1 :])

    def coordinate(self, rank: int) -> dict[str, int]:
        """Returns the position of a rank along every axis."""
        return {axis: rank // self.stride(axis) % size for axis, size in self.axes.items()}

    def group(self, axis: str, rank: int) -> list[int]:
        """Returns the ranks that differ from a rank only in ``axis``, and the rank itself."""
        stride = self.stride(axis)
        first = rank - rank // stride % self.axes[axis] * stride
        return [first + n * stride for n in range(self.axes[axis])]

    def groups(self, axis: str) -> list[list[int]]:
        """Returns all groups of ranks that differ only in ``axis``, ordered by their first rank."""
        size, stride = self.axes[axis], self.stride(axis)
        return [self.group(axis, rank) for rank in range(self.world) if rank // stride % size == 0]

    def mesh(self, groups: Groups, device_type: str, purposes: Mapping[str, str] = MappingProxyType({})) -> DeviceMesh:
        """Makes a ``DeviceMesh`` of the ranks of this rank's stage, with the other axes as dimensions.

        Every rank must call it, because it makes process groups.

        Args:
            purposes: axis -> purpose of its groups (``Groups.get``), where they have one.
        """
        stage, *axes = self.axes
        ranks = torch.arange(self.world).view(*self.axes.values())[self.coordinate(dist.get_rank())[stage]]
        made = [groups.get(self.groups(axis), purposes.get(axis, "")) for axis in axes]
        return DeviceMesh.from_group(made, device_type, mesh=ranks, mesh_dim_names=tuple(axes))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, View) and self.axes == other.axes

    def __hash__(self) -> int:
        return hash(tuple(self.axes.items()))

    def __repr__(self) -> str:
        return f"View({self.axes})"


class Groups:
    """The process groups of a run. All ranks must ask for the same ones in the same order."""

    def __init__(self) -> None:
        self._made: dict[tuple[str, tuple[tuple[int, ...], ...]], dist.ProcessGroup] = {}

    def get(self, partition: Sequence[Sequence[int]], purpose: str = "") -> dist.ProcessGroup:
        """Returns the process group that this rank is in.

        All ranks make a group or none does: NCCL makes it out of that of the world, in which all ranks must take part, and
        PyTorch names it after its ranks and the number of groups so far.

        Args:
            partition: the ranks of each group. A rank that is in none of them gets a group of its own.
            purpose: groups of the same ranks with different purposes are different groups.
        """
        rank, key = dist.get_rank(), (purpose, tuple(map(tuple, partition)))
        ranks = next((group for group in key[1] if rank in group), (rank,))
        if len(ranks) == dist.get_world_size() and not purpose:
            assert dist.group.WORLD is not None
            return dist.group.WORLD
        if key not in self._made:
            # With local synchronization, only the ranks of a group make it: of 1,024 ranks, each makes one group, not hundreds.
            made = dist.new_group(list(ranks), use_local_synchronization=True)
            assert isinstance(made, dist.ProcessGroup)
            self._made[key] = made
        return self._made[key]

    def __len__(self) -> int:
        return len(self._made)

    def __iter__(self) -> Iterator[dist.ProcessGroup]:
        return iter(self._made.values())
