"""The order in which strategies are applied to a plain model: one line each, with the reason for its place."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch

from ..config import Config
from ..models.config import DecoderConfig
from ..models.decoder import Decoder
from ..models.init import Initializer
from ..models.lora import freeze_all_but_adapters
from ..ops.precision import COMPUTE
from . import data_axis, isp, tensor
from .data_axis import DataAxis, Sharded, SingleProcess
from .isp import InternSequenceParallel
from .layout import Layout, Meshes
from .memory import Memory, activations
from .recompute import recompute
from .schedule import OneStage, Schedule
from .shards import initialize
from .strategy import Collectives, Inner, Workload, add_up
from .tensor import TensorParallel


def build(decoder: DecoderConfig, config: Config, layout: Layout, device: torch.device) -> tuple[Decoder, DataAxis, Schedule]:
    """The model of a run, spread over the ranks, with its initial weights, on ``device``; who owns its weights; and how
    micro-batches go through it."""
    section = config.model
    with torch.device("meta"):
        model = Decoder(decoder, embed_grad_scale=section.embed_grad_scale)
    layers = [layer for _, layer in model.numbered_layers()]
    meshes = Meshes.of(layout, device.type) if layout.world > 1 else None
    # Innermost: the weights of a layer are cut, and its collectives put in.
    inner = Inner()
    if meshes is not None and layout.mode != "isp" and layout.tensor > 1:
        kv_mesh = meshes.kv_weights["heads", "copies"] if meshes.kv_weights is not None else None
        inner = TensorParallel(meshes.weights["inner"], layout.mode, kv_mesh).apply(model)
    elif meshes is not None and layout.mode == "isp" and max(layout.tensor, layout.weight) > 1:
        tokens = meshes.activations["tensor"]
        inner = InternSequenceParallel(meshes.weights["inner"], tokens, config.parallel.weight).apply(model)
    if decoder.lora is not None:
        freeze_all_but_adapters(model)
    # What a layer keeps for backward. isp's linears are not compiled, and so no layer as a whole.
    whole = layout.weight == 1
    compiled: Literal["no", "inside", "around"] = "no" if not section.compile else "around" if whole else "inside"
    recompute(layers, section.checkpoint, config.selective_checkpoint, compiled)
    # Compiled with recomputation inside, and before sharding, so that hooks stay outside the compiled code.
    if section.compile:
        for layer in layers:
            layer.compile(fullgraph=whole)
    # Outermost: the data axis owns the weights. Only now are there tensors, and only this rank's part of them.
    dtype = COMPUTE[section.dtype]
    axis: DataAxis
    if meshes is None:
        axis = SingleProcess(model, device, dtype)
    else:
        axis = Sharded(model, meshes, device, dtype, layout.fsdp, inner, config.hybrid_zero_optimizer)
    initialize(axis.masters, Initializer.of(section, config.seed, decoder.norm_unit_offset))
    axis.masters_changed()
    return model, axis, OneStage(model, axis, device)


# The same on paper ---------------------------------------------------------------------------------------------------


def traffic(work: Workload) -> list[Collectives]:
    """The collectives of a step, of all strategies together (without the one small all-reduce of losses and counts)."""
    on_rank, inner = _on_rank(work), isp if work.layout.mode == "isp" else tensor
    shapes = [[parameter.shape for parameter in unit] for unit in on_rank]
    partial: dict[str, list[Sequence[int]]] = {}
    for parameter in itertools.chain(*on_rank):
        if parameter.partial is not None:
            partial.setdefault(parameter.partial, []).append(parameter.shape)
    return add_up([*inner.traffic(work), *data_axis.traffic(work, shapes, partial)], work.layout)


def memory(work: Workload) -> Memory:
    """Bytes on rank 0 (where shards that do not come out even are largest)."""
    layout = work.layout
    shapes = [parameter.shape for parameter in itertools.chain(*_on_rank(work))]
    inner = isp if layout.mode == "isp" else tensor
    return Memory(*data_axis.memory(work, shapes), activations(work, inner.memory(work)))


class OnRank(NamedTuple):
    """A parameter on a rank, before the data axis shards it."""

    shape: list[int]
    partial: str | None
    """Axis over which its gradients are summed after the last backward."""


def _on_rank(work: Workload) -> list[list[OnRank]]:
    """The parameters of a rank, by the units of the data axis."""
    layout, inner = work.layout, isp if work.layout.mode == "isp" else tensor
    with torch.device("meta"):
        model = Decoder(work.decoder)
    found: dict[int, OnRank] = {}
    for module in model.modules():
        axes = tuple(getattr(module, "axes", ()))
        for name, parameter in module.named_parameters(recurse=False):
            shape = inner.shape_on_rank(parameter.shape, axes, name, layout)
            found[id(parameter)] = OnRank(shape, inner.partial_axis(axes, name, layout))
    bucket = None if layout.fsdp else work.bucket
    modules = data_axis.units(model, bucket, lambda parameter: math.prod(found[id(parameter)].shape))
    return [[found.pop(id(p)) for module in unit for p in module.parameters() if id(p) in found] for unit in modules]
