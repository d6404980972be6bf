"""Whole matrices for an optimizer that needs them (Muon), of weights whose shards are on many ranks: who computes what.

The matrices of a stage are dealt among all ranks that have its weights: each is put together on one rank, which computes its
update and sends each rank its part (``teams.py``). This goes in waves, in which every rank computes at most one job, which is a
matrix or the experts of a rank:

| group     | per wave                                                                                     |
|-----------|----------------------------------------------------------------------------------------------|
| shards    | 1 all-to-all of the parts to the ranks that compute, and 1 back, unless each has its whole   |
| replicate | 1 all-gather: replicas compute different matrices, and each rank needs its parts of them all |

``shards`` are the ranks zero x inner (for experts zero x expert x inner), which together have every weight once. If every rank
has whole experts, each computes its own, as one batch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from ..models.layers import DecoderLayer
from ..models.linear import Linear
from ..models.moe import ExpertLinear
from . import expert, tensor
from .layout import Layout
from .shards import chunk, shard_dim_of_experts
from .strategy import Collectives
from .views import View

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


class Unit(NamedTuple):
    """A weight that is one matrix, or the experts of some ranks as a batch of them."""

    shape: tuple[int, ...]
    """[rows, columns] or [experts, rows, columns]."""
    parts: dict[int, Part]
    """Rank of ``shards`` -> which rows and columns it has, for those that have some."""
    firsts: dict[Part, int]
    """The first rank that has a part."""
    stays: bool
    """Whether every rank has a whole unit of this weight, and so computes its own."""


class Job(NamedTuple):
    """What one rank computes in a wave."""

    name: str
    unit: Unit
    replica: int
    """The position along ``replicate`` of the rank that computes it."""
    owner: int
    """Its position along ``shards``."""
    wave: int

    def size(self, rank: int) -> int:
        """Returns the number of elements that a rank has."""
        part = self.unit.parts.get(rank)
        return 0 if part is None else math.prod(self.unit.shape[:-2]) * math.prod(_sizes(part))

    def sends(self, rank: int) -> int:
        """Returns the number of elements that a rank sends to the owner. Of ranks with the same part, the owner does, or else
        the first one."""
        part, its = self.unit.parts.get(rank), self.unit.parts.get(self.owner)
        if part is None:
            return 0
        return self.size(rank) if rank == (self.owner if part == its else self.unit.firsts[part]) else 0

    def cut(self, whole: Tensor, rank: int) -> Tensor:
        """Returns the part of a rank."""
        (top, bottom), (left, right) = self.unit.parts[rank]
        return whole[..., top:bottom, left:right]

    @property
    def travels(self) -> bool:
        """Whether other ranks than the owner have a part of it."""
        return len(self.unit.parts) > (self.owner in self.unit.parts)


@lru_cache(maxsize=64)
def deal(weights: tuple[Matrix, ...], layout: Layout, apart: bool) -> list[Job]:
    """Deals the matrices of a stage among the ranks that have its weights, the largest first: each to a replica that has the
    least to compute, and there to such a rank.

    Args:
        weights: those of the dense weights, or those of experts.
        apart: whether they are experts on ranks of their own.
    """
    view = _view(layout, apart)
    replicas, ranks = range(view.axes["replicate"]), range(view.axes["shards"])
    units = [(matrix.name, unit) for matrix in weights for unit in _units(matrix.shape, matrix.axes, layout, apart)]
    of_ranks, of_replicas, jobs = [[(0, 0)] * len(ranks) for _ in replicas], [(0, 0)] * len(replicas), list[Job]()
    for name, unit in sorted(units, key=lambda unit: -_cost(unit[1].shape)):
        if unit.stays:  # the load of a replica is that of these ranks
            replica = min(replicas, key=lambda k: (min(of_ranks[k][rank] for rank in unit.parts), of_replicas[k]))
        else:
            replica = min(replicas, key=of_replicas.__getitem__)
        owner = min(unit.parts if unit.stays else ranks, key=of_ranks[replica].__getitem__)
        jobs.append(Job(name, unit, replica, owner, of_ranks[replica][owner][1]))
        for loads, place in ((of_ranks[replica], owner), (of_replicas, replica)):
            load, count = loads[place]
            loads[place] = load + _cost(unit.shape), count + 1
    return jobs


def _view(layout: Layout, apart: bool) -> View:
    return layout.expert_shards if apart else layout.shards


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
    """Returns a chunk of a part along a dimension."""
    return (*part[:dim], chunk(part[dim], number, place), *part[dim + 1 :])


@lru_cache(maxsize=64)
def _units(shape: tuple[int, ...], axes: tuple[str, ...], layout: Layout, apart: bool) -> list[Unit]:
    """Returns a matrix; or of experts, for each rank that has other ones, these."""
    parts, of_experts = _parts(shape, axes, layout, apart), dict[Part, dict[int, Part]]()
    for rank, part in enumerate(parts):
        if 0 not in _sizes(part):
            of_experts.setdefault(part[:-2], {})[rank] = part[-2:]
    everything = tuple((0, size) for size in shape[-2:])
    whole = sum(part == everything for its in of_experts.values() for part in its.values())
    return [
        Unit((*_sizes(experts), *shape[-2:]), its, {part: rank for rank, part in reversed(its.items())}, whole == len(parts))
        for experts, its in of_experts.items()
    ]


class Wave(NamedTuple):
    """A wave as one rank sees it. Sizes are numbers of elements, one for each rank of ``shards``."""

    replica: int
    rank: int
    """The positions of this rank along ``replicate`` and ``shards``."""
    mine: Job | None
    """What it computes."""
    parts: list[Job]
    """Of which it has a part, in all replicas."""
    shared: list[list[Job]]
    """The same for each replica, in the order of the owners."""
    travels: bool
    """Whether parts go to other ranks of its replica."""
    given: list[Job]
    """Of which it then sends its part, in the order of the owners."""
    sent: list[int]
    received: list[int]
    """What it sends to the owners, and gets as an owner."""
    sent_back: list[int]
    received_back: list[int]
    """The same for updates."""

    @property
    def space(self) -> int:
        """The largest number of elements that this rank has of what one replica computes."""
        return max(sum(job.size(self.rank) for job in jobs) for jobs in self.shared)


def waves(weights: Sequence[Matrix], layout: Layout, apart: bool, replica: int, rank: int) -> list[Wave]:
    """Returns the waves as the rank at these positions along ``replicate`` and ``shards`` sees them. Other arguments as for
    ``deal``."""
    view = _view(layout, apart)
    ranks, found = range(view.axes["shards"]), dict[int, list[Job]]()
    for job in sorted(deal(tuple(weights), layout, apart), key=lambda job: (job.wave, job.replica, job.owner)):
        found.setdefault(job.wave, []).append(job)
    return [_wave(jobs, range(view.axes["replicate"]), ranks, replica, rank) for jobs in found.values()]


def _wave(jobs: Sequence[Job], replicas: range, ranks: range, replica: int, rank: int) -> Wave:
    here = {job.owner: job for job in jobs if job.replica == replica}
    mine, travels = here.get(rank), any(job.travels for job in here.values())
    parts = [job for job in jobs if rank in job.unit.parts]
    return Wave(
        replica, rank, mine, parts, [[job for job in parts if job.replica == k] for k in replicas], travels,
        given=[job for job in here.values() if travels and job.sends(rank)],
        sent=[here[owner].sends(rank) if owner in here else 0 for owner in ranks],
        received=[mine.sends(other) if mine else 0 for other in ranks],
        sent_back=[mine.size(other) if mine else 0 for other in ranks],
        received_back=[here[owner].size(rank) if owner in here else 0 for owner in ranks],
    )  # fmt: skip


def divided(weights: Sequence[Matrix], layout: Layout) -> tuple[list[Matrix], list[Matrix]]:
    """Returns the dense weights, and the experts on ranks of their own."""
    dense, experts = list[Matrix](), list[Matrix]()
    for weight in weights:
        (experts if weight.of_experts and layout.experts_apart else dense).append(weight)
    return dense, experts


def _waves_of(weights: Sequence[Matrix], layout: Layout, rank: int) -> list[tuple[str, list[Wave]]]:
    """Returns the waves of the dense weights and of experts, with what the names of their axes begin with."""
    found = list[tuple[str, list[Wave]]]()
    for its, apart in zip(divided(weights, layout), (False, True), strict=True):
        at = _view(layout, apart).coordinate(rank)
        found.append(("expert " * apart, waves(its, layout, apart, at["replicate"], at["shards"]) if its else []))
    return found


def traffic(weights: Sequence[Matrix], layout: Layout, rank: int, element_bytes: int) -> list[Collectives]:
    """Returns the collectives of an update of the matrices of a stage, for one rank."""
    rows = list[Collectives]()
    for prefix, its in _waves_of(weights, layout, rank):
        exchanged = sum(sum(wave.sent) + sum(wave.sent_back) for wave in its if wave.travels)
        rows.append(
            Collectives("all-to-all", f"{prefix}shards", 2 * sum(wave.travels for wave in its), exchanged * element_bytes)
        )
        spaces = [wave.space * len(wave.shared) for wave in its if len(wave.shared) > 1 and wave.space]
        rows.append(Collectives("all-gather", f"{prefix}replicate", len(spaces), sum(spaces) * element_bytes))
    return rows


def memory(weights: Sequence[Matrix], layout: Layout, rank: int, element_bytes: int) -> int:
    """Returns the most bytes that a rank has at a time while it updates the matrices of a stage, besides its state."""
    its = [wave for _, found in _waves_of(weights, layout, rank) for wave in found]
    return max((_bytes(wave, element_bytes) for wave in its), default=0)


def _bytes(wave: Wave, element_bytes: int) -> int:
    """Returns the most bytes that a rank has at a time in a wave."""
    own = [job.size(wave.rank) for job in wave.parts]
    shape = wave.mine.unit.shape if wave.mine else (0, 1)
    whole, gets_back, replicas = math.prod(shape), sum(wave.received_back), len(wave.shared)
    sending = sum(own) + sum(wave.sent) * wave.travels
    iteration = 3 * whole + 2 * whole * min(shape[-2:]) // max(shape[-2:])
    sending_back = whole + sum(wave.sent_back) + gets_back if wave.travels else 2 * whole
    shared = (replicas + 1) * wave.space if replicas > 1 else 0
    # A weight and its update in fp32, before and after they are added. The update is a view of all that has come.
    adding = max(gets_back, whole, shared) + 12 * max(own, default=0) // element_bytes
    return element_bytes * max(sending, iteration, sending_back, gets_back + shared, adding)
