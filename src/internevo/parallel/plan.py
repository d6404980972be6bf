"""The order in which strategies are applied to a plain model: one line each, with the reason for its place."""

from __future__ import annotations

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
    initialize(axis.masters, Initializer.of(section, seed))
    axis.masters_changed()
    return model, axis


@torch.no_grad()
def initialize(masters: dict[str, nn.Parameter], initializer: Initializer) -> None:
    """Fills every weight with this rank's part of its initial value."""
    for name, parameter in masters.items():
        if isinstance(parameter, DTensor):
            parameter.to_local().copy_(_local_part(name, parameter, initializer))
        else:
            parameter.copy_(initializer.rows(name, parameter.shape, 0, parameter.shape[0]))


def _local_part(name: str, parameter: DTensor, initializer: Initializer) -> Tensor:
    placements = parameter.placements
    if all(p == Replicate() or (type(p) is Shard and p.dim == 0) for p in placements):
        local, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, placements)
        rows = local[0] if local else 0
        return initializer.rows(name, parameter.shape, offset[0], offset[0] + rows)
    full = initializer.rows(name, parameter.shape, 0, parameter.shape[0])
    return distribute_tensor(full, parameter.device_mesh, placements, src_data_rank=None).to_local()
