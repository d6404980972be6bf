"""What has to be done in a step, which depends on the layout: what each stage computes, and the messages of its collectives."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

from ..models.config import Stage
from ..parallel import data_axis, expert, isp, tensor
from ..parallel.layout import Layout
from ..parallel.strategy import Collectives, Workload
from . import flops
from .flops import Amounts, Passes
from .job import Job
from .links import Group

MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
"""Of a layer, which Muon updates. (Latent attention and experts have others.)"""


class Message(NamedTuple):
    """Collectives of one kind over one group."""

    kind: str
    number: float
    nbytes: float
    group: Group
    axis: str = ""


class Inside(NamedTuple):
    """What one micro-batch costs in the layers of a stage, whatever the optimizer state is sharded over."""

    passes: Passes
    waited: list[Message]
    prefetched: list[Message]
    units: list[int]
    """The elements of each unit of the data axis on a rank, before they are sharded."""
    experts: dict[int, list[tuple[int, int, int]]]
    """Layer -> the shapes of its experts, if they are a unit of their own."""
    elements: dict[str, int]
    """As in ``StageCounts``."""
    sharded: dict[tuple[str, int], tuple[list[Message], float]]
    """(Axis of ZeRO, its ranks) -> what sharding over them costs (``_sharded``), as far as it is known."""


StageKind = tuple[tuple[tuple[bool, int, str], ...], bool, bool]
"""The kinds of a stage's layers (``DecoderConfig.kind``), and whether it has the embedding and the head."""
Insides = dict[StageKind, Inside]


class StageCounts(NamedTuple):
    """What one micro-batch costs in a stage, and what a step costs besides."""

    passes: Passes
    waited: list[Message]
    """Collectives of a micro-batch that are waited for, in both passes together."""
    prefetched: list[Message]
    """Collectives of a micro-batch that can run while it computes, in both passes together."""
    gathered: list[Message]
    """ZeRO-1.5: of weights, once per step."""
    reduced: list[Message]
    """ZeRO-1.5: of gradients, once per step."""
    shard: float
    """Elements of the rank's shards, which the optimizer updates."""
    update: Amounts
    """What Muon computes."""
    exchanged: list[Message]
    """What Muon sends."""
    first: float
    """The share of the first unit of the data axis in all, without experts: nothing computes before its weights are there, nor
    while its gradients are reduced."""
    elements: dict[str, int]
    """Axis of ZeRO -> elements of the weights that are sharded over it, on the rank, before they are."""


@dataclass(frozen=True)
class Counts:
    """What a step costs, on every stage."""

    job: Job
    stages: tuple[StageCounts, ...]
    message: Message | None
    """What a stage sends to the next one."""


def count(job: Job, insides: Insides | None = None, zeros: tuple[int, int] | None = None) -> Counts:
    """Returns what a step costs. Stages with the same layers are counted once.

    Args:
        insides: of jobs that differ from this one only in the ranks over which optimizer state is sharded. What is missing is
            added.
        zeros: the ranks over which the optimizer state of dense weights and of experts is sharded; None: those of the layout.
    """
    layout = job.work.layout
    zeros = zeros or (layout.zero, layout.expert_zero)
    stages, known = list[StageCounts](), dict[StageKind, StageCounts]()
    decoder, insides = job.work.decoder, {} if insides is None else insides
    for stage in job.stages():
        kinds = tuple(decoder.kind(number) for number in stage.layers)
        key = kinds, stage.embeds, stage.heads
        if key not in known:
            insides[key] = insides.get(key) or _inside(job, stage)
            known[key] = _count_stage(job, stage, insides[key], zeros)
        stages.append(known[key])
    return Counts(job, tuple(stages), message_of(job))


def message_of(job: Job) -> Message | None:
    """Returns what a stage of a pipeline sends to the next one."""
    work, layout = job.work, job.work.layout
    if layout.pipeline == 1:
        return None
    tokens = work.tokens / (layout.tensor if layout.shards_sequence else 1)
    return Message("send", 1, tokens * work.decoder.hidden_size * work.element_bytes, Group(2, layout.world // layout.pipeline))


def groups_of(layout: Layout) -> dict[str, Group]:
    """Returns where the ranks of the groups of each axis are."""
    weights, activations, experts = layout.weights, layout.activations, layout.experts
    found = {
        "head": (layout.attention, "head"), "context": (layout.attention, "context"),
        "tensor": (activations, "tensor"), "data": (activations, "data"), "weight": (weights, "inner"),
        "zero": (weights, "zero"), "replicate": (weights, "replicate"), "shards": (layout.shards, "shards"),
        "expert": (experts, "expert"), "expert weight": (experts, "inner"),
        "expert zero": (experts, "zero"), "expert replicate": (experts, "replicate"),
    }  # fmt: skip
    return {name: Group(view.axes[axis], view.stride(axis)) for name, (view, axis) in found.items()}


def _inside(job: Job, stage: Stage) -> Inside:
    waited, prefetched = list[Message](), list[Message]()
    work, groups = replace(job.work, stages=(stage,), micro_batches=1), groups_of(job.work.layout)
    hides = {"weight": work.prefetches, "expert weight": work.prefetches_experts}
    for row in of_layers(work):
        (prefetched if hides.get(row.axis) else waited).extend(messages([row], groups))
    units, experts = _units(work, stage)
    routed = sum(math.prod(shape) for unit in experts.values() for shape in unit)
    elements = {"zero": sum(units), "expert zero": routed}
    return Inside(flops.stage(job, stage.layers, stage.heads), waited, prefetched, units, experts, elements, {})


def _count_stage(job: Job, stage: Stage, inside: Inside, zeros: tuple[int, int]) -> StageCounts:
    prefetched = inside.prefetched
    of_dense, shard = _sharded(job, stage, inside, "zero", zeros[0])
    of_experts, shard_of_experts = _sharded(job, stage, inside, "expert zero", zeros[1])
    of_data = [*of_dense, *of_experts]
    gathers = [message for message in of_data if message.kind == "all-gather"]
    reductions = [message for message in of_data if message.kind != "all-gather"]
    if job.work.layout.fsdp:
        prefetched, gathers, reductions = [*prefetched, *of_data], [], []
    elements, shards = inside.elements, shard + shard_of_experts
    first = inside.units[0] / elements["zero"]
    update, exchanged = flops.update(job, stage.layers) if job.iterations else Amounts(), _exchanged(job, stage, shards, zeros)
    return StageCounts(
        inside.passes, inside.waited, prefetched, gathers, reductions, shards, update, exchanged, first, elements
    )  # fmt: skip


def _exchanged(job: Job, stage: Stage, shard: float, zeros: tuple[int, int]) -> list[Message]:
    """Returns what Muon sends (``parallel.matrices``), with all weights as dense ones: parts to the ranks that compute and
    back, and the updates of other replicas, which are padded if these do not have the same number of matrices."""
    if not job.iterations:
        return []
    layout, nbytes = replace(job.work.layout, zero=zeros[0]), int(shard * job.work.element_bytes)
    groups, share = groups_of(layout), len(stage.layers) * len(MATRICES) / layout.replicate
    padded = int(nbytes * math.ceil(share) / share)
    rows = [Collectives("all-to-all", "shards", 2, 2 * nbytes), Collectives("all-gather", "replicate", 1, padded)]
    return messages(rows, groups)


def _sharded(job: Job, stage: Stage, inside: Inside, axis: str, ranks: int) -> tuple[list[Message], float]:
    """Returns the messages of the data axis and the elements of a rank's shards: of dense weights (axis "zero") or of experts
    ("expert zero"), which do not depend on the ranks over which the others are sharded."""
    if (axis, ranks) not in inside.sharded:
        of_experts, layout = axis == "expert zero", job.work.layout
        layout = replace(layout, expert_zero=ranks) if of_experts else replace(layout, zero=ranks)
        work = replace(job.work, layout=layout, stages=(stage,), micro_batches=1)
        units = [] if of_experts else [[(elements,)] for elements in inside.units]
        experts = inside.experts if of_experts else {}
        rows = data_axis.traffic(work, units, experts, {}, stage.heads)
        _, shard = data_axis.sharded([*units, *experts.values()], ranks, of_experts)
        inside.sharded[axis, ranks] = messages(rows, groups_of(layout)), shard
    return inside.sharded[axis, ranks]


def of_layers(work: Workload) -> list[Collectives]:
    """Returns the collectives inside the layers: all but those of the data axis and of the pipeline."""
    inner = isp if work.layout.mode == "isp" else tensor
    return [*inner.traffic(work), *expert.traffic(work)]


def messages(rows: Iterable[Collectives], groups: dict[str, Group]) -> list[Message]:
    """Returns collectives with where their ranks are, without those of a single rank."""
    return [
        Message(row.kind, row.count, row.nbytes, groups[row.axis], row.axis)
        for row in rows
        if row.count and row.axis in groups and groups[row.axis].size > 1
    ]


def _units(work: Workload, stage: Stage) -> tuple[list[int], dict[int, list[tuple[int, int, int]]]]:
    """Returns the elements on a rank of each unit of the data axis, before that shards them; and layer -> the shapes of its
    experts, if they are a unit of their own."""
    layout, decoder = work.layout, work.decoder
    d, inner, e = decoder.hidden_size, layout.inner, decoder.experts
    attention = 2 * d
    for name, linear in decoder.projections().items():
        whole = linear.heads is None and layout.mode != "isp"
        replicas = layout.kv_replicas if name in ("k", "v") else 1
        attention += linear.outputs * linear.inputs * replicas // (1 if whole else inner)
    layers, experts = list[int](), dict[int, list[tuple[int, int, int]]]()
    for number in stage.layers:
        if e is None or not decoder.is_sparse(number):
            layers.append(attention + 3 * d * decoder.intermediate_size // inner)
            continue
        columns = e.size // layout.expert_inner
        shapes = [(e.count // layout.expert, columns, d)] * 2 + [(e.count // layout.expert, d, columns)]
        elements = attention + 3 * d * e.shared_size // inner + d * e.count
        if layout.experts_apart:
            experts[number] = shapes
        else:
            elements += 3 * d * e.count * columns
        layers.append(elements)
    ends = decoder.vocab_size * d // inner
    bucket = None if layout.fsdp else work.bucket_elements
    joined = [sum(layers[position] for position in unit) for unit in data_axis.join(layers, bucket)]
    tied_twice = decoder.tie_embeddings and stage.embeds and stage.heads
    return [*([ends] * stage.embeds), *joined, *([ends * (not tied_twice) + d] * stage.heads)], experts
