"""The order in which strategies are applied to a plain model: one line each, with the reason for its place."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import Replicate, Shard

from ..config.model import Model
from ..models import Decoder, DecoderConfig, Initializer
from . import data
from .layout import Layout
from .recompute import recompute


def build(
    config: DecoderConfig, model_section: Model, layout: Layout, mesh: DeviceMesh, device: torch.device, seed: int
) -> Decoder:
    """The model of a run: spread over the ranks, with its initial weights, on ``device``."""
    with torch.device("meta"):
        model = Decoder(config, embed_grad_scale=model_section.embed_grad_scale)
    layers = list(model.layers)
    # Innermost: what a layer keeps for backward.
    recompute(layers, model_section.checkpoint)
    # Compiled with recomputation inside, and before sharding, so that hooks stay outside the compiled code.
    if model_section.compile:
        for layer in layers:
            layer.compile(fullgraph=True)
    # Outermost: the data axis owns the parameters.
    data.shard(model, layers, mesh, model_section.dtype, layout.fsdp)
    # Only now are there tensors, and only this rank's part of them.
    model.to_empty(device=device)
    initialize(model, Initializer.of(model_section, seed))
    return model


@torch.no_grad()
def initialize(model: Decoder, initializer: Initializer) -> None:
    """Fills every parameter with this rank's part of its initial value."""
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            parameter.to_local().copy_(_local_part(name, parameter, initializer))
        else:
            parameter.copy_(initializer.rows(name, parameter.shape, 0, parameter.shape[0]))


def _local_part(name: str, parameter: DTensor, initializer: Initializer) -> Tensor:
    placements = parameter.placements
    if all(p == Replicate() or type(p) is Shard and p.dim == 0 for p in placements):
        local, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, placements)
        rows = local[0] if local else 0
        return initializer.rows(name, parameter.shape, offset[0], offset[0] + rows)
    full = initializer.rows(name, parameter.shape, 0, parameter.shape[0])
    return distribute_tensor(full, parameter.device_mesh, placements, src_data_rank=None).to_local()
