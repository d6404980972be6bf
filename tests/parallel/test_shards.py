"""Where each rank's part of a tensor lies, against the parts that DTensor and ``fully_shard`` give it."""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from internevo.parallel.shards import fill_local, local, local_box
from internevo.parallel.world import World
from tests.pool import Pool

PROCESSES = 4
SIZES = [
    {"a": 4}, {"a": 2, "b": 2}, {"a": 4, "b": 1}, {"a": 1, "b": 4},
    {"a": 2, "b": 2, "c": 1}, {"a": 2, "b": 1, "c": 2}, {"a": 1, "b": 2, "c": 2},
]  # fmt: skip
"""Meshes of 4 processes."""


@dataclass
class Distributed:
    """A tensor that DTensor spreads over a mesh."""

    sizes: dict[str, int]
    shape: tuple[int, ...]
    cut: list[int | None]
    """Axis of the tensor that each dimension of the mesh cuts; None: it has copies."""

    def parameter(self, mesh: DeviceMesh) -> nn.Parameter:
        places = [Replicate() if axis is None else Shard(axis) for axis in self.cut]
        return nn.Parameter(distribute_tensor(full(self.shape), mesh, places, src_data_rank=None))


@dataclass
class Trained:
    """A weight as in training: cut by a tensor mode first, and then by the data axis along its first axis."""

    sizes: dict[str, int]
    """replicate, zero, inner; or zero, heads, copies: keys and values."""
    shape: tuple[int, ...]
    axis: int | None
    """Axis that the tensor mode cuts."""

    def parameter(self, mesh: DeviceMesh) -> nn.Parameter:
        module = nn.Module()
        module.weight = nn.Parameter(full(self.shape))
        if self.axis is not None:
            inner = mesh["heads", "copies"] if "heads" in self.sizes else mesh["inner"]
            places: list[Placement] = [Shard(self.axis), Replicate()]
            module.weight = nn.Parameter(distribute_tensor(module.weight.data, inner, places[: inner.ndim], src_data_rank=None))
        fully_shard(module, mesh=mesh["replicate", "zero"] if "replicate" in self.sizes else mesh["zero"])
        return module.weight


Case = Distributed | Trained
shapes = st.lists(st.integers(1, 9), min_size=1, max_size=3)


@st.composite
def distributed(draw: st.DrawFn) -> Distributed:
    """No axis is cut twice: DTensor by itself would do that in another order than strategies that come one after another."""
    sizes, shape = draw(st.sampled_from(SIZES)), draw(shapes)
    axes: list[int | None] = [*range(len(shape)), None, None, None]
    return Distributed(sizes, tuple(shape), draw(st.permutations(axes))[: len(sizes)])


@st.composite
def trained(draw: st.DrawFn) -> Trained:
    names = draw(st.sampled_from([("zero", "inner"), ("replicate", "zero", "inner"), ("zero", "heads", "copies")]))
    numbers = draw(st.sampled_from([tuple(sizes.values()) for sizes in SIZES if len(sizes) == len(names)]))
    shape = draw(shapes)
    axis = draw(st.sampled_from([None, *range(min(len(shape), 2))]))
    return Trained(dict(zip(names, numbers, strict=True)), tuple(shape), axis)


def full(shape: tuple[int, ...]) -> Tensor:
    """Every element is another number."""
    return torch.arange(1.0, math.prod(shape) + 1).view(shape)


def rows_of(whole: Tensor, start: int, stop: int) -> Tensor:
    return whole[start:stop]


def parts(world: World, cases: list[Case]) -> list[tuple[list[tuple[int, int]], Tensor, Tensor, bool]]:
    """Of each case: this rank's box, what DTensor has given it, what ``fill_local`` puts there, and whether an axis is cut
    twice."""
    meshes: dict[tuple[tuple[str, int], ...], DeviceMesh] = {}
    found = []
    for case in cases:
        key = tuple(case.sizes.items())
        if key not in meshes:
            names, sizes = zip(*key, strict=True)
            meshes[key] = init_device_mesh("cpu", sizes, mesh_dim_names=names)
        parameter = case.parameter(meshes[key])
        given = local(parameter.detach()).clone()
        local(parameter.detach()).zero_()
        fill_local(parameter, partial(rows_of, full(case.shape)))
        strided = isinstance(parameter, DTensor) and any(isinstance(place, _StridedShard) for place in parameter.placements)
        found.append((local_box(parameter), given, local(parameter.detach()).clone(), strided))
    return found


def compare(pool: Pool, cases: list[Case]) -> bool:
    """Whether any axis was cut twice."""
    results = pool.run(parts, PROCESSES, cases, device="cpu")
    for number, case in enumerate(cases):
        whole, copies = full(case.shape), torch.zeros(case.shape)
        for rank in range(PROCESSES):
            box, given, filled, _ = results[rank][number]
            place = tuple(slice(start, stop) for start, stop in box)
            empty = given.numel() == whole[place].numel() == 0  # then shapes mean nothing
            assert empty or torch.equal(whole[place], given), (case, rank, box, given)
            assert torch.equal(filled, given), (case, rank, filled, given)
            copies[place] += 1
        assert copies.min() == copies.max() >= 1, (case, copies)  # every element is somewhere, and as often as any other
    return any(strided for *_, strided in results[0])


@settings(max_examples=3, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_boxes_are_where_dtensor_puts_its_parts(pool: Pool, data: Any) -> None:
    compare(pool, data.draw(st.lists(distributed(), min_size=20, max_size=40)))


@settings(max_examples=3, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_boxes_are_where_fully_shard_puts_its_parts(pool: Pool, data: Any) -> None:
    """Also where it cuts the axis again that a tensor mode has cut, and where sizes do not come out even."""
    twice = Trained({"replicate": 1, "zero": 2, "inner": 2}, (7, 3), 0)
    assert compare(pool, [twice, *data.draw(st.lists(trained(), min_size=20, max_size=40))])


def test_a_plain_tensor_is_whole() -> None:
    parameter = nn.Parameter(torch.zeros(3, 5))
    assert local_box(parameter) == [(0, 3), (0, 5)]
    fill_local(parameter, partial(rows_of, full((3, 5))))
    assert torch.equal(parameter.detach(), full((3, 5)))
