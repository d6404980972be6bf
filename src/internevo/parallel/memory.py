"""Memory of one rank: by the strategies' formulas, and as it was in a step.

P = parameters of a rank before the data axis shards them, z = ranks of a ZeRO group, c and g = bytes of an element of the
compute and gradient dtype:

|          | masters | moments | weights                   | gradients |
|----------|---------|---------|---------------------------|-----------|
| ZeRO-1.5 | 4 P / z | 8 P / z | c P                       | g P       |
| FSDP     | 4 P / z | 8 P / z | those of units in use     | 4 P / z   |

Per layer and token, a dense layer keeps for backward: the inputs of both norms, and the inputs of q, k, v and of gate, up (D
each); q, k, v and the attention's output; gate, up, and their product.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..config import Config
from ..models.config import DecoderConfig
from ..models.decoder import Decoder
from .layout import Layout
from .tensor import cut_along


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank, when the last forward of a step is over and its backward begins."""

    masters: int
    """fp32 weights."""
    moments: int
    """AdamW's."""
    state: int
    """Weights in full and gradients, before that forward."""
    activations: int
    """What that forward has kept."""

    NAMES: ClassVar = {
        "masters": "fp32 masters", "moments": "moments", "state": "weights and gradients", "activations": "activations",
    }  # fmt: skip

    @property
    def total(self) -> int:
        """All of it."""
        return self.masters + self.moments + self.state + self.activations


def planned(decoder: DecoderConfig, config: Config, layout: Layout, tokens: int) -> Memory:
    """By formula, of rank 0 (shards that do not come out even are largest there), for dense models.

    Args:
        tokens: of a micro-batch, packed into one row.
    """
    compute = 4 if config.model.dtype in ("float32", "tf32") else 2
    grad = 4 if config.hybrid_zero_optimizer.grad_dtype == "float32" else 2
    shapes = list(local_shapes(decoder, layout))
    whole = sum(math.prod(shape) for shape in shapes)
    shard = sum(-(-shape[0] // layout.zero) * math.prod(shape[1:]) for shape in shapes)
    alone = layout.world == 1
    weights = 0 if layout.fsdp or (alone and compute == 4) else compute * whole
    gradients = 4 * shard if layout.fsdp else (4 if alone else grad) * whole
    return Memory(4 * shard, 8 * shard, weights + gradients, activations(decoder, config, layout, tokens, compute))


def local_shapes(decoder: DecoderConfig, layout: Layout) -> Iterator[list[int]]:
    """Shapes of a rank's parameters before the data axis shards them."""
    with torch.device("meta"):
        model = Decoder(decoder)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if decoder.tie_embeddings and module is model.head:
                continue
            shape, axes = list(parameter.shape), tuple(getattr(module, "axes", ()))
            if layout.mode == "isp":
                dim, ranks = (0, layout.weight) if name == "weight" and parameter.dim() == 2 else (None, 1)
            else:
                dim, ranks = cut_along(axes, name), layout.tensor
            if dim is not None:
                shape[dim] //= ranks // layout.kv_copies if "kv_heads" in axes else ranks
            yield shape


def activations(decoder: DecoderConfig, config: Config, layout: Layout, tokens: int, element: int) -> int:
    """Bytes that one forward keeps for backward."""
    t, mode, d = layout.tensor, layout.mode, decoder.hidden_size
    inside = tokens // t if mode == "isp" or t == 1 else tokens
    outside = tokens // t if layout.cuts_sequence else tokens
    stream = outside * (d * element + 4)  # a norm's input, and its scale
    given = element * d * (tokens if mode == "msp" else outside)  # the input of q, k, v, or of gate, up
    heads, kv_heads = decoder.num_heads // t, max(1, decoder.num_kv_heads // t)
    out = element * tokens * heads * decoder.head_dim + 4 * tokens * heads  # the kernel's output and its log-sum-exp
    attention = given + element * tokens * (heads + 2 * kv_heads) * decoder.head_dim + out
    if mode == "isp" and t > 1:
        attention += element * tokens * heads * decoder.head_dim  # the output before and behind the all-to-all
    mlp = given + 3 * element * decoder.intermediate_size * (tokens // t)
    kept = out if config.selective_checkpoint else 0
    share = config.model.checkpoint
    if share == "attention":
        layers = decoder.num_layers * (2 * stream + element * d * outside + kept + mlp)
    else:
        recomputed = int(decoder.num_layers * share)
        layers = recomputed * (stream - 4 * outside + kept)
        layers += (decoder.num_layers - recomputed) * (2 * stream + attention + mlp)
    rows = decoder.vocab_size // (1 if mode == "isp" else t)
    head = element * d * ((tokens if t > 1 and mode != "isp" else inside) + rows)  # gradients, computed with the loss
    angles = element * tokens * decoder.head_dim if decoder.rope else 0
    return layers + stream + head + angles
