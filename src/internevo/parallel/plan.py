"""The order in which strategies are applied to a plain model: one line each, with the reason for its place."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Shard, _StridedShard

from ..config import Config
from ..models import Decoder, DecoderConfig, Initializer
from ..models.layers import DecoderLayer
from ..models.lora import freeze_all_but_adapters
from .collectives import local
from .data import COMPUTE, DataAxis, Inner, Sharded, SingleProcess
from .isp import InternSequenceParallel
from .layout import Layout
from .recompute import recompute
from .tensor import TensorParallel


def build(decoder: DecoderConfig, config: Config, layout: Layout, device: torch.device) -> tuple[Decoder, DataAxis]:
    """The model of a run: spread over the ranks, with its initial weights, on ``device``; and who owns its weights."""
    section = config.model
    with torch.device("meta"):
        model = Decoder(decoder, embed_grad_scale=section.embed_grad_scale)
    layers = [cast(DecoderLayer, layer) for layer in model.layers]
    mesh = layout.weight_mesh(device.type) if layout.world > 1 else None
    # Innermost: the weights of a layer are cut, and its collectives put in.
    inner = Inner()
    if mesh is not None and layout.mode != "isp" and layout.tensor > 1:
        kv_mesh = mesh["heads", "copies"] if layout.kv_copies > 1 else None
        inner = TensorParallel(mesh["inner"], layout.mode, kv_mesh).apply(model)
    elif mesh is not None and layout.mode == "isp" and max(layout.tensor, layout.weight) > 1:
        tokens = layout.activation_mesh(device.type)["tensor"]
        inner = InternSequenceParallel(mesh["inner"], tokens, config.parallel.weight).apply(model)
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
    if mesh is None:
        axis = SingleProcess(model, device, dtype)
    else:
        axis = Sharded(model, mesh, device, dtype, layout.fsdp, inner, config.hybrid_zero_optimizer)
    initialize(axis.masters, Initializer.of(section, config.seed, decoder.norm_unit_offset))
    axis.masters_changed()
    return model, axis


def initialize(masters: dict[str, nn.Parameter], initializer: Initializer) -> None:
    """Fills every weight with this rank's part of its initial value."""
    for name, parameter in masters.items():
        fill_local(parameter, partial(initializer.rows, name, parameter.shape))


@torch.no_grad()
def fill_local(parameter: nn.Parameter, values: Callable[[int, int], Tensor]) -> None:
    """Fills this rank's part of a weight from ``values(start, stop)``, the full tensor's slices along its first axis."""
    (start, stop), *others = local_box(parameter)
    part = local(parameter)
    if part.numel():
        part.copy_(values(start, stop)[(slice(None), *(slice(a, b) for a, b in others))])


def local_box(parameter: Tensor) -> list[tuple[int, int]]:
    """(start, stop) of this rank's part along every axis of the full tensor.

    Inner dimensions of the mesh have cut first, outer ones what was left; each as ``torch.chunk`` does.
    """
    box = [(0, size) for size in parameter.shape]
    if not isinstance(parameter, DTensor):
        return box
    mesh, coordinate = parameter.device_mesh, parameter.device_mesh.get_coordinate()
    assert coordinate is not None
    for dim in reversed(range(mesh.ndim)):
        place = parameter.placements[dim]
        if isinstance(place, Shard | _StridedShard):
            start, stop = box[place.dim]
            step = -(-(stop - start) // mesh.size(dim))
            first = min(start + coordinate[dim] * step, stop)
            box[place.dim] = (first, min(first + step, stop))
    return box
