"""Whole matrices for an optimizer that needs them (Muon), of weights whose shards are on many ranks.

The matrices of a stage are dealt among all ranks that have its weights: each is put together on one rank, which computes its
update and sends each rank its part. This goes in waves, in which every rank has at most one matrix:

| group     | per wave                                                                                     |
|-----------|----------------------------------------------------------------------------------------------|
| shards    | 1 all-to-all of the parts to the ranks that compute, and 1 back, unless each has its whole   |
| replicate | 1 all-gather: replicas compute different matrices, and each rank needs its parts of them all |

``shards`` are the ranks zero x inner (for experts zero x expert x inner), which together have every weight once. The experts of
a rank are one batch of matrices. Where a rank has whole experts, it computes those.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..models.layers import DecoderLayer
from ..models.linear import Linear
from ..models.moe import ExpertLinear
from . import expert, tensor
from .collectives import Group, all_gather, send_parts
from .layout import Layout, Meshes
from .shards import shard_dim_of_experts
from .strategy import Collectives

Part = tuple[tuple[int, int], ...]
"""(start, stop) along every dimension."""


class Matrix(NamedTuple):
    """A weight of a layer that is a matrix, or those of its experts [experts, rows, columns]."""

    name: str
    shape: tuple[int, ...]
    """Of the full weight."""
    axes: tuple[str, ...]

    @property
    def of_experts(self) -> bool:
        """Whether it is one matrix for each expert."""
        return len(self.shape) == 3


def matrices(layers: Sequence[tuple[int, DecoderLayer]]) -> list[Matrix]:
    """Returns the matrices of layers: all linears but the gate of a shared expert, which is a vector, and routers."""
    found = list[Matrix]()
    for number, layer in layers:
        for path, module in layer.named_modules():
            if isinstance(module, Linear | ExpertLinear) and is_matrix(module.axes):
                found.append(Matrix(f"layers.{number}.{path}.weight", tuple(module.weight.shape), tuple(module.axes)))
    return found


def is_matrix(axes: Sequence[str]) -> bool:
    """Whether the weight of a linear with these axes is a matrix."""
    return axes[0] != "one"


class Job(NamedTuple):
    """One matrix, or one batch of them, that one rank computes."""

    name: str
    shape: tuple[int, ...]
    """[rows, columns] or [experts, rows, columns]."""
    parts: dict[int, Part]
    """Rank of ``shards`` -> which rows and columns it has, for those that have some."""
    replica: int
    """The position along ``replicate`` of the rank that computes it."""
    owner: int
    """Its position along ``shards``."""
    wave: int

    def size(self, rank: int) -> int:
        """Returns the number of elements that a rank has."""
        part = self.parts.get(rank, ())
        return math.prod(self.shape[:-2]) * math.prod(stop - start for start, stop in part) if part else 0

    def sends(self, rank: int) -> int:
        """Returns the number of elements that a rank sends to the owner. Of ranks with the same part, the owner does, or else
        the first one."""
        part = self.parts.get(rank)
        if part is None:
            return 0
        if self.parts.get(self.owner) == part:
            return self.size(rank) if rank == self.owner else 0
        return self.size(rank) if rank == next(other for other, its in self.parts.items() if its == part) else 0

    def cut(self, whole: Tensor, rank: int) -> Tensor:
        """Returns the part of a rank."""
        (top, bottom), (left, right) = self.parts[rank]
        return whole[..., top:bottom, left:right]

    @property
    def travels(self) -> bool:
        """Whether other ranks than the owner have a part of it."""
        return any(rank != self.owner for rank in self.parts)


@lru_cache(maxsize=64)
def deal(weights: tuple[Matrix, ...], layout: Layout, apart: bool) -> list[Job]:
    """Deals the matrices of a stage among the ranks that have its weights: the largest first, each to one of those that have
    the least to compute.

    Args:
        weights: those of the dense weights, or those of experts.
        apart: whether they are experts on ranks of their own.
    """
    view = layout.expert_shards if apart else layout.shards
    replicas, ranks = view.axes["replicate"], view.axes["shards"]
    units = [(matrix.name, *unit) for matrix in weights for unit in _units(matrix.shape, matrix.axes, layout, apart)]
    loads, jobs = {(k, g): (0, 0) for k in range(replicas) for g in range(ranks)}, list[Job]()
    for name, shape, parts in sorted(units, key=lambda unit: -_cost(unit[1])):
        everything = tuple((0, size) for size in shape[-2:])
        those = [rank for rank, part in parts.items() if part == everything] or range(ranks)
        replica, owner = min(itertools.product(range(replicas), those), key=loads.__getitem__)
        load, wave = loads[replica, owner]
        jobs.append(Job(name, shape, parts, replica, owner, wave))
        loads[replica, owner] = load + _cost(shape), wave + 1
    return jobs


def _cost(shape: Sequence[int]) -> int:
    return math.prod(shape) * min(shape[-2:])


def _parts(shape: tuple[int, ...], axes: tuple[str, ...], layout: Layout, apart: bool) -> list[Part]:
    """Returns which part of a weight each rank of ``shards`` has: first the experts are divided, then what the tensor mode
    divides, and then the rest by ZeRO."""
    zero, experts, inner = (layout.expert_zero, layout.expert, layout.expert_inner) if apart else (layout.zero, 1, layout.inner)
    found = list[Part]()
    for z, e, i in itertools.product(range(zero), range(experts), range(inner)):
        part: Part = tuple((0, size) for size in shape)
        part = _cut(part, 0, experts, e)
        dim, number, place = _inner(axes, layout, part, i)
        part = part if dim is None else _cut(part, dim, number, place)
        found.append(_cut(part, shard_dim_of_experts(_sizes(part), zero) if apart else 0, zero, z))
    return found


def _inner(axes: tuple[str, ...], layout: Layout, part: Part, place: int) -> tuple[int | None, int, int]:
    """Returns the dimension that the tensor mode divides, into how many parts, and which of them a rank has."""
    if len(part) == 3:
        if layout.expert_inner == 1:
            return None, 1, 0
        return expert.inner_dim(_sizes(part), axes, layout), layout.expert_inner, place
    if layout.mode == "isp":
        return 0, layout.weight, place
    replicas = layout.kv_replicas if axes[0] == "kv_heads" else 1
    return tensor.sharded_dim(axes, "weight"), layout.tensor // replicas, place // replicas


def _sizes(part: Part) -> list[int]:
    return [stop - start for start, stop in part]


def _cut(part: Part, dim: int, number: int, place: int) -> Part:
    """Divides a dimension as ``torch.chunk`` does."""
    start, stop = part[dim]
    step = -(-(stop - start) // number)
    first = min(start + place * step, stop)
    return (*part[:dim], (first, min(first + step, stop)), *part[dim + 1 :])


@lru_cache(maxsize=64)
def _units(
    shape: tuple[int, ...], axes: tuple[str, ...], layout: Layout, apart: bool
) -> list[tuple[tuple[int, ...], dict[int, Part]]]:
    """Returns the shape of a matrix, and which rows and columns of it each rank has; of experts, one for those of a rank."""
    of_experts: dict[Part, dict[int, Part]] = {}
    for rank, part in enumerate(_parts(shape, axes, layout, apart)):
        if 0 not in _sizes(part):
            of_experts.setdefault(part[:-2], {})[rank] = part[-2:]
    return [((*_sizes(experts), *shape[-2:]), parts) for experts, parts in of_experts.items()]


class Team:
    """The ranks that have the dense weights of a stage, or its experts."""

    def __init__(self, weights: Sequence[Matrix], layout: Layout, mesh: DeviceMesh | None, apart: bool) -> None:
        """
        Args:
            weights: those that the team updates.
            mesh: dimensions replicate and shards. None: this rank is alone.
            apart: whether they are experts on ranks of their own.
        """
        self.names = [weight.name for weight in weights]
        self.waves = waves(deal(tuple(weights), layout, apart))
        self.replica, self.rank = (0, 0) if mesh is None else (mesh.get_local_rank("replicate"), mesh.get_local_rank("shards"))
        self.replicate, self.shards = (_group(mesh, axis) for axis in ("replicate", "shards"))

    def run(
        self, direction: Callable[[str], Tensor], compute: Callable[[Tensor], Tensor], nothing: Tensor
    ) -> Iterator[tuple[str, Tensor]]:
        """Yields the name of each weight and this rank's part of its update. Every rank must take all of them.

        Args:
            direction: returns this rank's part of what the update of a weight is computed from. It is called once for each.
            compute: returns the update of whole matrices.
            nothing: no elements, of the dtype and on the device of directions.
        """
        for wave in self.waves:
            parts = {job.name: direction(job.name) for job in wave if job.size(self.rank)}
            mine = next((job for job in wave if (job.replica, job.owner) == (self.replica, self.rank)), None)
            here = [job for job in wave if job.replica == self.replica]
            if any(job.travels for job in here):
                whole = self._gather(here, mine, parts, nothing)
                updates = self._scatter(here, mine, nothing if whole is None else compute(whole), parts)
            else:
                updates = {} if mine is None else {mine.name: compute(parts[mine.name])}
            yield from (updates if self.replicate is None else self._share(wave, updates, parts, nothing)).items()

    def _gather(self, jobs: Sequence[Job], mine: Job | None, parts: Mapping[str, Tensor], nothing: Tensor) -> Tensor | None:
        """Sends this rank's parts to the owners. Returns the matrix that this rank owns."""
        assert self.shards is not None
        ranks = range(self.shards.size())
        sent = _by_owner({job.owner: job.sends(self.rank) for job in jobs}, len(ranks))
        received = [0 if mine is None else mine.sends(rank) for rank in ranks]
        flat = torch.cat([nothing, *(parts[job.name].reshape(-1) for job in jobs if job.sends(self.rank))])
        arrived = send_parts(flat, sent, received, self.shards)
        if mine is None:
            return None
        whole = arrived.new_empty(mine.shape)
        for rank, values in enumerate(arrived.split(received)):
            if values.numel():
                part = mine.cut(whole, rank)
                part.copy_(values.view(part.shape))
        return whole

    def _scatter(self, jobs: Sequence[Job], mine: Job | None, update: Tensor, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sends each rank its part of the matrix that this rank owns. Returns this rank's parts of all."""
        assert self.shards is not None
        ranks = range(self.shards.size())
        sent = [0 if mine is None else mine.size(rank) for rank in ranks]
        owned = [mine.cut(update, rank).reshape(-1) for rank in ranks if sent[rank]] if mine is not None else [update]
        theirs = [job for job in jobs if job.size(self.rank)]
        received = _by_owner({job.owner: job.size(self.rank) for job in theirs}, len(ranks))
        return _split(send_parts(torch.cat(owned), sent, received, self.shards), theirs, parts)

    def _share(
        self, wave: Sequence[Job], updates: Mapping[str, Tensor], parts: Mapping[str, Tensor], nothing: Tensor
    ) -> dict[str, Tensor]:
        """Returns this rank's parts of the matrices that all replicas have computed."""
        assert self.replicate is not None
        flat, found = nothing.new_zeros(largest(wave, self.rank)), dict[str, Tensor]()
        joined = torch.cat([nothing, *(update.reshape(-1) for update in updates.values())])
        flat[: joined.numel()] = joined
        for replica, values in enumerate(all_gather(flat, self.replicate).chunk(self.replicate.size()) if flat.numel() else ()):
            found |= _split(values, of_replica(wave, replica, self.rank), parts)
        return found


def _group(mesh: DeviceMesh | None, axis: str) -> Group | None:
    return mesh[axis].get_group() if mesh is not None and mesh[axis].size() > 1 else None


def teams(layers: Sequence[tuple[int, DecoderLayer]], layout: Layout, meshes: Meshes | None) -> list[Team]:
    """Makes the teams that update the matrices of layers."""
    dense, experts = divided(matrices(layers), layout)
    of_dense, of_experts = (None, None) if meshes is None else (meshes.shards, meshes.expert_shards)
    found = [Team(dense, layout, of_dense, apart=False)]
    return [*found, Team(experts, layout, of_experts, apart=True)] if experts else found


def divided(weights: Sequence[Matrix], layout: Layout) -> tuple[list[Matrix], list[Matrix]]:
    """Returns the dense weights, and the experts on ranks of their own."""
    apart = [weight for weight in weights if weight.of_experts and layout.experts_apart]
    return [weight for weight in weights if weight not in apart], apart


def _split(values: Tensor, jobs: Sequence[Job], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the parts of a rank, which are one after the other in ``values``."""
    sizes = [like[job.name].numel() for job in jobs]
    parts = values[: sum(sizes)].split(sizes)
    return {job.name: part.view(like[job.name].shape) for job, part in zip(jobs, parts, strict=True)}


def waves(jobs: Sequence[Job]) -> list[list[Job]]:
    """Returns the jobs of each wave, in the order of their owners."""
    found: dict[int, list[Job]] = {}
    for job in sorted(jobs, key=lambda job: (job.wave, job.replica, job.owner)):
        found.setdefault(job.wave, []).append(job)
    return list(found.values())


def _by_owner(found: Mapping[int, int], ranks: int) -> list[int]:
    """Returns a number for each rank."""
    return [found.get(rank, 0) for rank in range(ranks)]


def of_replica(wave: Sequence[Job], replica: int, rank: int) -> list[Job]:
    """Returns the jobs of a wave that a replica computes and of which a rank has a part, in the order of ``_share``."""
    return [job for job in wave if job.replica == replica and job.size(rank)]


def largest(wave: Sequence[Job], rank: int) -> int:
    """Returns the largest number of elements of a rank that a replica computes in a wave."""
    return max(sum(job.size(rank) for job in of_replica(wave, replica, rank)) for replica in {job.replica for job in wave})


def traffic(weights: Sequence[Matrix], layout: Layout, rank: int, element_bytes: int) -> list[Collectives]:
    """Returns the collectives of an update of the matrices of a stage, for one rank."""
    dense, experts = divided(weights, layout)
    return [
        row for its, apart in ((dense, False), (experts, True)) for row in _traffic(its, layout, rank, apart, element_bytes)
    ]


def _traffic(weights: Sequence[Matrix], layout: Layout, rank: int, apart: bool, element_bytes: int) -> list[Collectives]:
    view, prefix = (layout.expert_shards, "expert ") if apart else (layout.shards, "")
    at, replicas = view.coordinate(rank), view.axes["replicate"]
    exchange, share = Collectives("all-to-all", f"{prefix}shards"), Collectives("all-gather", f"{prefix}replicate")
    for wave in waves(deal(tuple(weights), layout, apart)):
        here = [job for job in wave if job.replica == at["replicate"]]
        if any(job.travels for job in here):
            mine = next((job for job in here if job.owner == at["shards"]), None)
            exchange.count += 2
            back = 0 if mine is None else sum(mine.size(other) for other in range(view.axes["shards"]))
            exchange.nbytes += (sum(job.sends(at["shards"]) for job in here) + back) * element_bytes
        if replicas > 1 and largest(wave, at["shards"]):
            share.count += 1
            share.nbytes += replicas * largest(wave, at["shards"]) * element_bytes
    return [exchange, share]
