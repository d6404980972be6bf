"""Where each rank's shard is in the full tensor, compared with the shards that DTensor and ``fully_shard`` make."""

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
    """A tensor that DTensor distributes over a mesh."""

    sizes: dict[str, int]
    shape: tuple[int, ...]
    sharded: list[int | None]
    """For each dimension of the mesh, the dimension of the tensor that it shards; None: it has replicas."""

    def parameter(self, mesh: DeviceMesh) -> nn.Parameter:
        placements = [Replicate() if dim is None else Shard(dim) for dim in self.sharded]
        return nn.Parameter(distribute_tensor(full(self.shape), mesh, placements, src_data_rank=None))


@dataclass
class Trained:
    """A weight as in training: sharded by a tensor mode, and then by the data axis along dimension 0."""

    sizes: dict[str, int]
    """Dimensions of the mesh: replicate, zero, inner; or, for keys and values, zero, heads, kv_replicas."""
    shape: tuple[int, ...]
    dim: int | None
    """Dimension that the tensor mode shards."""

    def parameter(self, mesh: DeviceMesh) -> nn.Parameter:
        module = nn.Module()
        module.weight = nn.Parameter(full(self.shape))
        if self.dim is not None:
            inner = mesh["heads", "kv_replicas"] if "heads" in self.sizes else mesh["inner"]
            placements: list[Placement] = [Shard(self.dim), Replicate()][: inner.ndim]
            module.weight = nn.Parameter(distribute_tensor(module.weight.data, inner, placements, src_data_rank=None))
        fully_shard(module, mesh=mesh["replicate", "zero"] if "replicate" in self.sizes else mesh["zero"])
        return module.weight


Case = Distributed | Trained
shapes = st.lists(st.integers(1, 9), min_size=1, max_size=3)


@st.composite
def distributed(draw: st.DrawFn) -> Distributed:
    sizes, shape = draw(st.sampled_from(SIZES)), draw(shapes)
    dims = st.sampled_from([None, *range(len(shape))])
    return Distributed(sizes, tuple(shape), draw(st.lists(dims, min_size=len(sizes), max_size=len(sizes))))


@st.composite
def trained(draw: st.DrawFn) -> Trained:
    names = draw(st.sampled_from([("zero", "inner"), ("replicate", "zero", "inner"), ("zero", "heads", "kv_replicas")]))
    numbers = draw(st.sampled_from([tuple(sizes.values()) for sizes in SIZES if len(sizes) == len(names)]))
    shape = draw(shapes)
    dim = draw(st.sampled_from([None, *range(min(len(shape), 2))]))
    return Trained(dict(zip(names, numbers, strict=True)), tuple(shape), dim)


def full(shape: tuple[int, ...]) -> Tensor:
    """A tensor of which every element is a different number."""
    return torch.arange(1.0, math.prod(shape) + 1).view(shape)


def rows_of(tensor: Tensor, start: int, stop: int) -> Tensor:
    return tensor[start:stop]


def shards(world: World, cases: list[Case]) -> list[tuple[list[tuple[int, int]], Tensor, Tensor, bool]]:
    """Returns for each case: this rank's box, its shard as DTensor made it, its shard as ``fill_local`` fills it, and whether a
    dimension is sharded twice."""
    meshes: dict[tuple[tuple[str, int], ...], DeviceMesh] = {}
    found = []
    for case in cases:
        key = tuple(case.sizes.items())
        if key not in meshes:
            names, sizes = zip(*key, strict=True)
            meshes[key] = init_device_mesh("cpu", sizes, mesh_dim_names=names)
        parameter = case.parameter(meshes[key])
        by_dtensor = local(parameter.detach()).clone()
        local(parameter.detach()).zero_()
        fill_local(parameter, partial(rows_of, full(case.shape)))
        strided = isinstance(parameter, DTensor) and any(isinstance(p, _StridedShard) for p in parameter.placements)
        found.append((local_box(parameter), by_dtensor, local(parameter.detach()).clone(), strided))
    return found


def compare(pool: Pool, cases: list[Case]) -> bool:
    """Compares all ranks. Returns whether any dimension was sharded twice."""
    results = pool.run(shards, PROCESSES, cases, device="cpu")
    for number, case in enumerate(cases):
        tensor, replicas = full(case.shape), torch.zeros(case.shape)
        for rank in range(PROCESSES):
            box, by_dtensor, filled, _ = results[rank][number]
            slices = tuple(slice(start, stop) for start, stop in box)
            empty = by_dtensor.numel() == tensor[slices].numel() == 0  # the shapes of empty shards may differ
            assert empty or torch.equal(tensor[slices], by_dtensor), (case, rank, box, by_dtensor)
            assert torch.equal(filled, by_dtensor), (case, rank, filled, by_dtensor)
            replicas[slices] += 1
        assert replicas.min() == replicas.max() >= 1, (case, replicas)  # all elements are on the same number of ranks
    return any(strided for *_, strided in results[0])


@settings(max_examples=3, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_boxes_are_those_of_dtensors_shards(pool: Pool, data: Any) -> None:
    compare(pool, data.draw(st.lists(distributed(), min_size=20, max_size=40)))


@settings(max_examples=3, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_boxes_are_those_of_fully_shards_shards(pool: Pool, data: Any) -> None:
    """Also if the data axis and a tensor mode shard the same dimension, and if sizes are uneven."""
    twice = Trained({"replicate": 1, "zero": 2, "inner": 2}, (7, 3), 0)
    assert compare(pool, [twice, *data.draw(st.lists(trained(), min_size=20, max_size=40))])


def test_the_box_of_a_plain_tensor_is_the_whole_tensor() -> None:
    parameter = nn.Parameter(torch.zeros(3, 5))
    assert local_box(parameter) == [(0, 3), (0, 5)]
    fill_local(parameter, partial(rows_of, full((3, 5))))
    assert torch.equal(parameter.detach(), full((3, 5)))
