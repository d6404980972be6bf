"""The order in which strategies are applied to a plain model: one line each, with the reason for its place."""

from __future__ import annotations

import torch

from ..config import Config
from ..models.config import DecoderConfig
from ..models.decoder import Decoder
from ..models.init import Initializer
from ..models.lora import freeze_all_but_adapters
from ..ops.precision import COMPUTE
from .data_axis import DataAxis, Sharded, SingleProcess
from .isp import InternSequenceParallel
from .layout import Layout, Meshes
from .recompute import recompute
from .shards import initialize
from .strategy import Inner
from .tensor import TensorParallel


def build(decoder: DecoderConfig, config: Config, layout: Layout, device: torch.device) -> tuple[Decoder, DataAxis]:
    """The model of a run: spread over the ranks, with its initial weights, on ``device``; and who owns its weights."""
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
        isp = InternSequenceParallel(meshes.weights["inner"], meshes.activations["tensor"], config.parallel.weight)
        inner = isp.apply(model)
    if decoder.lora is not None:
        freeze_all_but_adapters(model)
    # What a layer keeps for backward. isp's linears are not compiled, and so no layer as a whole.
    whole = layout.weight == 1
    recompute(layers, section.checkpoint, config.selective_checkpoint, compiled=section.compile and not whole)
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
    return model, axis
