"""The order in which strategies are applied to a plain model: one line each, with the reason for its place."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import Replicate, Shard

from ..config.model import Model
from ..models import Decoder, DecoderConfig, Initializer
from .data import COMPUTE, DataAxis, Sharded, SingleProcess
from .layout import Layout
from .recompute import recompute


def build(config: DecoderConfig, section: Model, layout: Layout, device: torch.device, seed: int) -> tuple[Decoder, DataAxis]:
    """The model of a run: spread over the ranks, with its initial weights, on ``device``; and who owns its weights."""
    with torch.device("meta"):
        model = Decoder(config, embed_grad_scale=section.embed_grad_scale)
    layers = list(model.layers)
    # Innermost: what a layer keeps for backward.
    recompute(layers, section.checkpoint)
    # Compiled with recomputation inside, and before sharding, so that hooks stay outside the compiled code.
    if section.compile:
        for layer in layers:
            layer.compile(fullgraph=True)
    # Outermost: the data axis owns the weights. Only now are there tensors, and only this rank's part of them.
    dtype = COMPUTE[section.dtype]
    axis: DataAxis
    if layout.data == 1:
        axis = SingleProcess(model, device, dtype)
    else:
        axis = Sharded(model, layout.data_mesh(device.type), device, dtype, layout.fsdp)
    initialize(axis.masters, Initializer.of(section, seed, config.norm_unit_offset))
    axis.masters_changed()
    return model, axis


def initialize(masters: dict[str, nn.Parameter], initializer: Initializer) -> None:
    """Fills every weight with this rank's part of its initial value."""
    for name, parameter in masters.items():
        fill_local(parameter, partial(initializer.rows, name, parameter.shape))


@torch.no_grad()
def fill_local(parameter: nn.Parameter, values: Callable[[int, int], Tensor]) -> None:
    """Fills this rank's part of a weight from ``values(start, stop)``, the full tensor's slices along its first axis."""
    if not isinstance(parameter, DTensor):
        parameter.copy_(values(0, parameter.shape[0]))
        return
    placements = parameter.placements
    if all(p == Replicate() or (type(p) is Shard and p.dim == 0) for p in placements):
        local, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, placements)
        rows = local[0] if local else 0
        if rows:
            parameter.to_local().copy_(values(offset[0], offset[0] + rows))
        return
    full = values(0, parameter.shape[0]).float()
    part = distribute_tensor(full, parameter.device_mesh, placements, src_data_rank=None)
    parameter.to_local().copy_(part.to_local())
