"""The order in which strategies are applied to a plain model, with the reason for it; and what they cost together."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist

from ..config import Config
from ..models.config import DecoderConfig, Stage
from ..models.decoder import Decoder
from ..models.init import Initializer
from ..models.linear import Linear
from ..models.lora import freeze_all_but_adapters
from ..models.moe import ExpertLinear
from ..ops.precision import COMPUTE
from . import data_axis, expert, isp, pipeline, tensor
from .data_axis import DataAxis, Sharded, SingleProcess, Weights
from .deferred import Deferred
from .expert import ExpertParallel
from .isp import InternSequenceParallel
from .layout import Layout, Meshes
from .memory import Elements, Memory, activations, left, weights_and_gradients
from .messages import DOWN, Channels, Plan, pairs, rounds
from .messages import kept as kept_messages
from .orders import BACKWARD, FORWARD, WEIGHTS, orders, stages_on
from .pipeline import Chunk, Chunks, Pipeline, PipelinedModel
from .recompute import recompute
from .schedule import OneStage, Schedule
from .shards import initialize
from .stages import split
from .strategy import AppliedStrategy, Collectives, Workload, add_up
from .tensor import TensorParallel
from .views import Groups


def build(
    decoder: DecoderConfig, config: Config, layout: Layout, device: torch.device
) -> tuple[Decoder | PipelinedModel, Weights, Schedule]:
    """Builds the model of a run, or this rank's stages of it, and applies all strategies. Its weights are not filled in yet.

    Every rank must call it.

    Returns:
        The model on ``device``; the data axis, which owns its weights; and the schedule, which runs micro-batches through it.
    """
    meshes = Meshes.from_layout(layout, device.type) if layout.world > 1 else None
    if meshes is None or layout.pipeline == 1:
        model, axis = _build_stage(Stage(range(decoder.num_layers)), decoder, config, layout, meshes, device)
        return model, axis, OneStage(model, axis, device)
    stages = split(decoder, layout.stages, config.data.seq_len, config.parallel.pipeline.layers)
    pipelines, dtype = layout.weights.groups("stage"), COMPUTE[config.model.dtype]
    ranks_of_stages = [layout.rank_of_stage(number) for number in range(len(stages))]
    channels = Channels(meshes.groups, pipelines, ranks_of_stages, device, dtype)
    chunks, mode = list[Chunk](), layout.schedule
    for number, stage in enumerate(stages):
        if channels.rank_of[number] == channels.rank:
            deferred = Deferred() if mode != "1F1B" else None
            chunks.append(Chunk(number, *_build_stage(stage, decoder, config, layout, meshes, device, deferred), deferred))
    both = Chunks([chunk.axis for chunk in chunks], _tied_group(decoder, layout, meshes.groups, ranks_of_stages))
    sequence_ranks = layout.tensor if layout.shards_sequence else 1
    return PipelinedModel(mode, chunks, channels), both, Pipeline(mode, chunks, both, channels, sequence_ranks)


def _build_stage(
    stage: Stage,
    decoder: DecoderConfig,
    config: Config,
    layout: Layout,
    meshes: Meshes | None,
    device: torch.device,
    deferred: Deferred | None = None,
) -> tuple[Decoder, DataAxis]:
    """Builds one stage, or the whole model, and applies the strategies to it, in the order that they need."""
    section = config.model
    with torch.device("meta"):
        model = Decoder(decoder, stage, embed_grad_scale=section.embed_grad_scale)
    layers = [layer for _, layer in model.numbered_layers()]
    # First what is inside a layer: its weights are sharded, and its collectives added.
    inner = AppliedStrategy()
    if meshes is not None and layout.mode != "isp" and layout.tensor > 1:
        kv_mesh = meshes.kv_weights["heads", "kv_replicas"] if meshes.kv_weights is not None else None
        mesh = meshes.weights["inner"]
        inner = TensorParallel(mesh, layout.mode, layout.experts_by_tensor, kv_mesh, deferred).apply(model)
    elif meshes is not None and layout.mode == "isp" and max(layout.tensor, layout.weight) > 1:
        inner = InternSequenceParallel(meshes.weights["inner"], meshes.tensor, config.parallel.weight, deferred).apply(model)
    if meshes is not None and decoder.experts is not None:
        inner += ExpertParallel(layout, meshes, config.parallel.expert_weight.overlap, deferred).apply(model)
    if deferred is not None:
        deferred.apply(model)
    if decoder.lora is not None:
        freeze_all_but_adapters(model)
    # Recomputation comes before compilation, so that compiled layers contain it. isp's linears, those that defer gradients, and
    # experts over ranks are not compiled, so with them no layer is compiled as a whole.
    whole_layers = (
        layout.weight == layout.expert == 1 and deferred is None and (layout.mode != "isp" or layout.expert_inner == 1)
    )
    compiled: Literal["no", "inside", "around"] = "no" if not section.compile else "around" if whole_layers else "inside"
    recompute(layers, section.checkpoint, config.selective_checkpoint, compiled)
    # Compilation comes before the data axis, so that the hooks of ``fully_shard`` stay outside the compiled code.
    if section.compile:
        for layer in layers:
            layer.compile(fullgraph=whole_layers)
    # Last the data axis, which owns the weights. It allocates memory, and only for this rank's shards.
    dtype = COMPUTE[section.dtype]
    if meshes is None or layout.world == layout.pipeline:
        return model, SingleProcess(model, device, dtype)
    zero = config.hybrid_zero_optimizer
    return model, Sharded(model, meshes, device, dtype, layout.fsdp, inner, zero)


def fill(axis: Weights, decoder: DecoderConfig, config: Config) -> None:
    """Fills in the initial weights."""
    initialize(axis.masters, Initializer.of(config.model, config.seed, decoder.norm_unit_offset))
    axis.masters_changed()


def _tied_group(
    decoder: DecoderConfig, layout: Layout, groups: Groups, ranks_of_stages: Sequence[int]
) -> dist.ProcessGroup | None:
    """Makes the group of the ranks of the first and the last stage, if they share the embedding's weight; it is that of their
    messages, if they are neighbours. Returns None on other ranks, and if both stages are on the same rank."""
    first, last = ranks_of_stages[0], ranks_of_stages[-1]
    if not decoder.tie_embeddings or first == last:
        return None
    links = next((links for links in rounds(ranks_of_stages) if (first, last) in links), [(first, last)])
    group = groups.get(pairs(layout.weights.groups("stage"), links), DOWN)
    return group if layout.weights.coordinate(dist.get_rank())["stage"] in (first, last) else None


# What it costs, by formula -------------------------------------------------------------------------------------------


def traffic(work: Workload) -> list[Collectives]:
    """Returns the collectives of a step, of all strategies together, without the one of ``train.step.traffic``."""
    inner = isp if work.layout.mode == "isp" else tensor
    rows = [*inner.traffic(work), *pipeline.traffic(work), *expert.traffic(work)]
    for stage in work.on_rank:
        dense, experts = _on_rank(work, stage)
        partial: dict[str, list[Sequence[int]]] = {}
        for parameter in itertools.chain(*dense):
            if parameter.partial is not None:
                partial.setdefault(parameter.partial, []).append(parameter.shape)
        shapes = [[parameter.shape for parameter in unit] for unit in dense]
        layers = [layer for layer in stage.layers if work.decoder.is_sparse(layer)]
        of_experts = {layer: [p.shape for p in unit] for layer, unit in zip(layers, experts, strict=False)}
        rows += data_axis.traffic(work, shapes, of_experts, partial)
    return add_up(rows, work.layout)


def memory(work: Workload) -> Memory:
    """Returns the bytes on the rank, after the pass that leaves the most (``Memory``).

    If shards have uneven sizes, they are those of the rank with the largest ones.
    """
    layout, rank, inner = work.layout, work.pipeline_rank, isp if work.layout.mode == "isp" else tensor
    work = replace(work, micro_batches=_enough(work.micro_batches, layout.pipeline))
    ranks_of_stages = [layout.rank_of_stage(number) for number in range(layout.stages)]
    planned = Plan.of(rank, orders(work.schedule, layout.pipeline, layout.chunks, work.micro_batches), ranks_of_stages)
    numbers = stages_on(rank, layout.pipeline, layout.chunks, work.schedule)
    stages = {number: replace(work, stages=(stage,)) for number, stage in zip(numbers, work.on_rank, strict=True)}
    elements, kept = {number: _elements(stage) for number, stage in stages.items()}, inner.memory(work)
    of_forward = {number: activations(stage, kept) for number, stage in stages.items()}
    of_backward = {number: left(stage, kept) if work.zero_bubble else 0 for number, stage in stages.items()}
    message = kept.residual_tokens * work.decoder.hidden_size * work.element_bytes
    shards = sum(stage.shard for stage in elements.values())
    masters, moments = 4 * (shards + _biases(work)), 8 * (shards - pipeline.copied_elements(work))
    passes, state, now, found = dict.fromkeys(stages, ""), dict.fromkeys(stages, 0), 0, list[Memory]()
    for action, messages in zip(planned.order, kept_messages(planned, rank, ranks_of_stages), strict=True):
        kind, number, _ = action
        passes[number] += kind
        state[number] = weights_and_gradients(work, elements[number], passes[number])
        now += of_forward[number] * (kind == FORWARD) + of_backward[number] * (kind == BACKWARD)
        now -= of_forward[number] * (kind == BACKWARD) + of_backward[number] * (kind == WEIGHTS)
        if kind == FORWARD or (kind == BACKWARD and work.zero_bubble):
            found.append(Memory(masters, moments, sum(state.values()), now + messages * message, action))
    return max(reversed(found), key=lambda memory: memory.total)


def _biases(work: Workload) -> int:
    """Returns the number of elements of the balance biases of the routers, which are never sharded."""
    experts = work.decoder.experts
    return (
        sum(work.decoder.is_sparse(layer) for layer in work.layers) * experts.count if experts and experts.balance_bias else 0
    )


def _enough(micro_batches: int, ranks: int) -> int:
    """Returns a number of micro-batches that is not larger, and with which the most memory is the same: passes repeat."""
    enough = 2 * ranks * (ranks + 1)
    return micro_batches if micro_batches <= enough else enough + micro_batches % ranks


def _elements(work: Workload) -> Elements:
    """Counts the parameters of the one stage of ``work``."""
    dense, experts = (list(itertools.chain(*units)) for units in _on_rank(work, work.on_rank[0]))
    deferred = [parameter.shape for parameter in (*dense, *experts) if parameter.deferred]
    return Elements.of(work, [parameter.shape for parameter in dense], [parameter.shape for parameter in experts], deferred)


class OnRank(NamedTuple):
    """A parameter of one rank before the data axis shards it."""

    shape: list[int]
    partial: str | None
    """Axis over which its gradients are summed after the last backward pass of a step."""
    deferred: bool
    """Whether a zero-bubble schedule computes its gradients apart from the backward passes."""


def _on_rank(work: Workload, stage: Stage) -> tuple[list[list[OnRank]], list[list[OnRank]]]:
    """Returns the parameters of a rank's stage, for each unit of the data axis; and those of units of experts, if there are."""
    layout, inner = work.layout, isp if work.layout.mode == "isp" else tensor
    with torch.device("meta"):
        model = Decoder(work.decoder, stage)
    found: dict[int, OnRank] = {}
    for module in model.modules():
        axes = tuple(getattr(module, "axes", ()))
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, ExpertLinear):
                found[id(parameter)] = OnRank(expert.shape_on_rank(parameter.shape, axes, layout), None, True)
            else:
                shape, deferred = inner.shape_on_rank(parameter.shape, axes, name, layout), isinstance(module, Linear)
                partial_axis = inner.partial_axis(axes, name, layout)
                found[id(parameter)] = OnRank(shape, partial_axis, deferred and name == "weight")
    apart, bucket = layout.experts_apart, None if layout.fsdp else work.bucket_elements
    joined = data_axis.units(model, bucket, lambda parameter: math.prod(found[id(parameter)].shape), apart)
    experts = data_axis.experts_in([model]) if apart else []
    of_experts = [[found.pop(id(parameter)) for parameter in unit.parameters()] for unit in experts]
    return [[found.pop(id(p)) for m in unit for p in m.parameters() if id(p) in found] for unit in joined], of_experts
