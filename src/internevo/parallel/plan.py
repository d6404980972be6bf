"""The order in which strategies are applied to a plain model, with the reason for it; and what they cost together."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, lru_cache
from operator import itemgetter, mul
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
from . import data_axis, expert, isp, matrices, pipeline, tensor
from .data_axis import DataAxis, Sharded, SingleProcess, Weights
from .deferred import Deferred
from .expert import ExpertParallel
from .isp import InternSequenceParallel
from .kept import points
from .layout import Layout, Meshes
from .matrices import Matrix
from .memory import Elements, Memory, activations, left, weights_and_gradients
from .messages import DOWN, Channels, pairs, rounds
from .orders import Action
from .pipeline import Chunk, Chunks, Pipeline, PipelinedModel
from .recompute import recompute
from .schedule import OneStage, Schedule
from .shards import initialize
from .stages import split
from .strategy import AppliedStrategy, Collectives, KeptActivations, Workload, add_up
from .teams import Team, teams
from .tensor import TensorParallel
from .views import Groups


class Built(NamedTuple):
    """What a rank has of a model."""

    model: Decoder | PipelinedModel
    axis: Weights
    schedule: Schedule
    teams: Sequence[Team]
    """With Muon: the ranks that update matrices together with this one."""


def build(decoder: DecoderConfig, config: Config, layout: Layout, device: torch.device, frozen: bool = False) -> Built:
    """Builds the model of a run, or this rank's stages of it, and applies all strategies. Its weights are not filled in yet.

    Every rank must call it.

    Args:
        frozen: nothing is trained, so that no weight needs a gradient or a master of its own.

    Returns:
        The model on ``device``; the data axis, which owns its weights; and the schedule, which runs micro-batches through it.
    """
    meshes = Meshes.from_layout(layout, device.type) if layout.world > 1 else None
    if meshes is None or layout.pipeline == 1:
        whole = Stage(range(decoder.num_layers))
        model, axis = _build_stage(whole, decoder, config, layout, meshes, device, frozen=frozen)
        return Built(model, axis, OneStage(model, axis, device), _teams(model, config, layout, meshes))
    stages = split(decoder, layout.stages, config.data.seq_len, config.parallel.pipeline.layers)
    pipelines, dtype = layout.weights.groups("stage"), COMPUTE[config.model.dtype]
    ranks_of_stages = [layout.rank_of_stage(number) for number in range(len(stages))]
    channels = Channels(meshes.groups, pipelines, ranks_of_stages, device, dtype)
    chunks, mode = list[Chunk](), layout.schedule
    for number, stage in enumerate(stages):
        if channels.rank_of[number] == channels.rank:
            deferred = Deferred() if mode != "1F1B" else None
            built = _build_stage(stage, decoder, config, layout, meshes, device, deferred, frozen)
            chunks.append(Chunk(number, *built, deferred))
    both = Chunks([chunk.axis for chunk in chunks], _tied_group(decoder, layout, meshes.groups, ranks_of_stages))
    sequence_ranks = layout.tensor if layout.shards_sequence else 1
    pipelined, schedule = PipelinedModel(mode, chunks, channels), Pipeline(mode, chunks, both, channels, sequence_ranks)
    return Built(pipelined, both, schedule, _teams(pipelined, config, layout, meshes))


def _teams(model: Decoder | PipelinedModel, config: Config, layout: Layout, meshes: Meshes | None) -> Sequence[Team]:
    return () if config.muon is None else teams(model.numbered_layers(), layout, meshes)


def _build_stage(
    stage: Stage,
    decoder: DecoderConfig,
    config: Config,
    layout: Layout,
    meshes: Meshes | None,
    device: torch.device,
    deferred: Deferred | None = None,
    frozen: bool = False,
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
        inner = InternSequenceParallel(layout, meshes, config.parallel.weight, deferred).apply(model)
    if meshes is not None and decoder.experts is not None:
        inner += ExpertParallel(layout, meshes, config.parallel.expert_weight.overlap, deferred).apply(model)
    if deferred is not None:
        deferred.apply(model)
    if frozen:
        model.requires_grad_(False)
    elif decoder.lora is not None:
        freeze_all_but_adapters(model)
    # Recomputation comes before compilation, so that compiled layers contain it. isp's linears, those that defer gradients, and
    # the hooks of experts that are a unit of the data axis are not compiled, so with them no layer is compiled as a whole.
    whole_layers = layout.weight == 1 and not layout.experts_apart and deferred is None
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
        partial: dict[str, list[tuple[int, ...]]] = {}
        for parameter in itertools.chain(*dense):
            if parameter.partial is not None:
                partial.setdefault(parameter.partial, []).append(parameter.shape)
        shapes = [[parameter.shape for parameter in unit] for unit in dense]
        layers = [layer for layer in stage.layers if work.decoder.is_sparse(layer)]
        of_experts = {layer: [p.shape for p in unit] for layer, unit in zip(layers, experts, strict=False)}
        rows += data_axis.traffic(work, shapes, of_experts, partial, stage.heads)
    if work.layout.muon:
        rows += matrices.traffic(_matrices(work), work.layout, work.rank, work.element_bytes)
    return add_up(rows, work.layout)


def memory(work: Workload) -> Memory:
    """Returns the bytes on the rank, after the pass that leaves the most (``Memory``)."""
    layout, inner = work.layout, isp if work.layout.mode == "isp" else tensor
    work = replace(work, micro_batches=enough(work.micro_batches, layout.pipeline))
    kept, alike = inner.memory(work), {_like(stage, work.decoder) for stage in work.on_rank}
    sizes = {stage: _StageBytes.of(replace(work, stages=(stage,)), kept) for stage in alike}
    stages = [sizes[_like(stage, work.decoder)] for stage in work.on_rank]
    message = message_bytes(work, kept)
    shards = sum(stage.elements.shard for stage in stages)
    moments = 8 * (shards - pipeline.copied_elements(work)) - 4 * sum(stage.elements.matrices for stage in stages)
    forward, backward = [stage.forward for stage in stages], [stage.backward for stage in stages]
    state = cache(lambda stage, passes: weights_and_gradients(work, stage.elements, passes))
    found = list[tuple[int, int, int, Action]]()
    for point in points(work.schedule, layout.pipeline, layout.chunks, work.micro_batches, work.pipeline_rank):
        now = point.messages * message + sum(map(mul, forward, point.forward)) + sum(map(mul, backward, point.backward))
        full = sum(map(state, stages, point.passes))
        found.append((full + now, full, now, point.after))
    _, full, now, after = max(reversed(found), key=itemgetter(0))
    return Memory(4 * (shards + _biases(work)), moments, full, now, after)


def message_bytes(work: Workload, kept: KeptActivations) -> int:
    """Returns the bytes of a message of the pipeline."""
    return kept.residual_tokens * work.decoder.hidden_size * work.element_bytes + work.pooled_bytes


class _StageBytes(NamedTuple):
    """What one stage needs."""

    elements: Elements
    forward: int
    """Bytes that a forward pass keeps."""
    backward: int
    """Bytes that a backward pass keeps, with a zero-bubble schedule."""

    @classmethod
    def of(cls, work: Workload, kept: KeptActivations) -> _StageBytes:
        return cls(elements(work), activations(work, kept), left(work, kept) if work.zero_bubble else 0)


def _like(stage: Stage, decoder: DecoderConfig) -> Stage:
    """Returns a stage that needs as much memory: the first one with as many layers, if all layers are alike."""
    if decoder.windows or decoder.layers_without_rope or (decoder.experts is not None and decoder.experts.dense_layers):
        return stage
    return replace(stage, layers=range(len(stage.layers)))


def _biases(work: Workload) -> int:
    """Returns the number of elements of the balance biases of the routers, which are never sharded."""
    experts = work.decoder.experts
    return (
        sum(work.decoder.is_sparse(layer) for layer in work.layers) * experts.count if experts and experts.balance_bias else 0
    )


def enough(micro_batches: int, ranks: int) -> int:
    """Returns a number of micro-batches that is not larger, and with which the most memory is the same: passes repeat."""
    enough = 2 * ranks * (ranks + 1)
    return micro_batches if micro_batches <= enough else enough + micro_batches % ranks


def elements(work: Workload) -> Elements:
    """Counts the parameters of the one stage of ``work``."""
    decoder = _shape_of(work.decoder)
    stage = _like(work.on_rank[0], decoder)
    # The same for all micro-batches and pipeline ranks, so that it is counted once for all of them.
    any_rank = replace(
        work,
        decoder=decoder,
        tokens=1,
        micro_batches=1,
        recomputed=0.0,
        keeps_attention=False,
        stages=(stage,),
        pipeline_rank=0,
    )
    return _count_elements(any_rank)


@lru_cache(maxsize=1024)
def _count_elements(work: Workload) -> Elements:
    decoder, layout, (stage,) = work.decoder, work.layout, work.on_rank
    sparse = sum(decoder.is_sparse(number) for number in stage.layers)
    parts = [(1, list(itertools.chain(*_ends(work, stage))))]
    parts += [(count, layer(work, kind)) for kind, count in ((True, sparse), (False, len(stage.layers) - sparse)) if count]
    total = Elements(0, 0, 0, 0, 0, 0)
    for count, parameters in parts:
        shapes = [parameter.shape for parameter in parameters if not (parameter.of_experts and layout.experts_apart)]
        experts = [parameter.shape for parameter in parameters if parameter.of_experts and layout.experts_apart]
        deferred = [parameter.shape for parameter in parameters if parameter.deferred]
        plain = [p.shape for p in parameters if p.matrix and not (p.of_experts and layout.experts_apart)]
        part = Elements.of(work, shapes, experts, deferred, plain if layout.muon else None)
        total = total.plus(part, count)
    if stage.heads:
        shapes = [parameter.shape for parameter in _ends(work, stage)[-1]]
        total = total._replace(head=Elements.of(work, shapes, (), ()).gathered)
    return total


class OnRank(NamedTuple):
    """A parameter of one rank before the data axis shards it."""

    shape: tuple[int, ...]
    partial: str | None
    """Axis over which its gradients are summed after the last backward pass of a step."""
    deferred: bool
    """Whether a zero-bubble schedule computes its gradients apart from the backward passes."""
    of_experts: bool
    matrix: bool
    """Whether Muon updates it."""


def _on_rank(work: Workload, stage: Stage) -> tuple[list[list[OnRank]], list[list[OnRank]]]:
    """Returns the parameters of a rank's stage, for each unit of the data axis; and those of units of experts, if there are."""
    decoder, apart = work.decoder, work.layout.experts_apart
    kinds = {sparse: layer(work, sparse) for sparse in {decoder.is_sparse(number) for number in stage.layers}}
    layers = [kinds[decoder.is_sparse(number)] for number in stage.layers]
    dense = [[parameter for parameter in layer if not (apart and parameter.of_experts)] for layer in layers]
    experts = [[parameter for parameter in layer if apart and parameter.of_experts] for layer in layers]
    sizes = [sum(math.prod(parameter.shape) for parameter in layer) for layer in dense]
    joined = data_axis.join(sizes, None if work.layout.fsdp else work.bucket_elements)
    first, ends = stage.embeds and not decoder.tie_embeddings, _ends(work, stage)
    units = [[parameter for number in unit for parameter in dense[number]] for unit in joined]
    return [*ends[:first], *units, *ends[first:]], [unit for unit in experts if unit]


def _ends(work: Workload, stage: Stage) -> list[list[OnRank]]:
    """Returns what a stage has besides its layers, for each unit."""
    bare = Stage(range(0), stage.embeds, stage.heads)
    return [[_placed(work, parameter) for parameter in unit] for unit in _units(_shape_of(work.decoder), bare) if unit]


def layer(work: Workload, sparse: bool) -> list[OnRank]:
    """Returns the parameters of a layer, with experts or without."""
    number = next(number for number in range(work.decoder.num_layers) if work.decoder.is_sparse(number) == sparse)
    layer = Stage(range(number, number + 1), embeds=False, heads=False)
    return [_placed(work, parameter) for parameter in _units(_shape_of(work.decoder), layer)[0]]


def _placed(work: Workload, parameter: _Parameter) -> OnRank:
    """Returns what a rank has of a parameter."""
    layout, inner = work.layout, isp if work.layout.mode == "isp" else tensor
    shape, axes, name, kind = parameter
    if kind is ExpertLinear:
        return OnRank(expert.shape_on_rank(shape, axes, layout), None, True, True, True)
    deferred = kind is Linear and name == "weight"
    local_shape, partial_axis = inner.shape_on_rank(shape, axes, name, layout), inner.partial_axis(axes, name, layout)
    return OnRank(local_shape, partial_axis, deferred, False, deferred and matrices.is_matrix(axes))


class _Parameter(NamedTuple):
    """A parameter of the whole model."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    name: str
    kind: type[Linear] | type[ExpertLinear] | None
    """What it belongs to; None: anything else."""


def _shape_of(decoder: DecoderConfig) -> DecoderConfig:
    """Returns the decoder without what its parameters do not depend on."""
    return replace(decoder, rope=None, window_rope=None, layers_without_rope=(), windows=())


def update_bytes(work: Workload) -> int:
    """Returns the most bytes that Muon needs at a time, besides weights, gradients and moments; 0 without it."""
    layout = work.layout
    return matrices.memory(_matrices(work), layout, work.rank, work.element_bytes) if layout.muon else 0


def _matrices(work: Workload) -> list[Matrix]:
    """Returns the matrices on the rank."""
    return [matrix for stage in work.on_rank for matrix in _matrices_of(_shape_of(work.decoder), stage)]


@lru_cache(maxsize=64)
def _matrices_of(decoder: DecoderConfig, stage: Stage) -> list[Matrix]:
    with torch.device("meta"):
        return matrices.matrices(Decoder(decoder, stage).numbered_layers())


@lru_cache(maxsize=64)
def _units(decoder: DecoderConfig, stage: Stage) -> list[list[_Parameter]]:
    """Returns the parameters of a stage, for each unit of the data axis. Building a model takes a hundred times longer than all
    else that is computed from them."""
    with torch.device("meta"):
        model = Decoder(decoder, stage)
    found: dict[int, _Parameter] = {}
    for module in model.modules():
        axes = tuple(getattr(module, "axes", ()))
        kind = next((kind for kind in (ExpertLinear, Linear) if isinstance(module, kind)), None)
        for name, parameter in module.named_parameters(recurse=False):
            found[id(parameter)] = _Parameter(tuple(parameter.shape), axes, name, kind)
    units = data_axis.units(model, None, torch.Tensor.numel, False)
    return [[found.pop(id(p)) for module in unit for p in module.parameters() if id(p) in found] for unit in units]
