"""The layers that all families consist of, as mathematics on a single device.

Each weight names its axes (``vocab``, ``embed``, ``heads``, ``kv_heads``, ``mlp``, ``expert``). They tell a strategy along
which dimensions the weight may be sharded.

Shapes: B rows, S tokens, D hidden, H query heads, K key/value heads, N head size, F width of the MLP, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from .config import DecoderConfig
from .linear import Linear
from .moe import MoE, Routing
from .rotary import rotate


class Context(NamedTuple):
    """What all layers with the same rotary embedding share in one forward pass."""

    cos: Tensor | None
    """cos of the angles of the rotary embedding [B, S, 1, R/2]; R elements of a head rotate. None: no rotary embedding."""
    sin: Tensor | None
    cu_seqlens: Tensor | None = None
    """Where the documents of one packed row begin and end, int32 [documents + 1]."""
    max_seqlen: int = 0
    """An upper bound of the length of a document."""


class Cache(NamedTuple):
    """The keys and values of earlier tokens in one layer, each [B, capacity, K, N]. The first ``length`` tokens are filled."""

    keys: Tensor
    values: Tensor
    length: int
    first: Tensor | None = None
    """Where each row's text begins, int64 [B]; before it is padding, which no token attends to. None: every row at 0."""


# The functions that a strategy may replace. Each layer holds one as an attribute and calls it. -----------------------------


def project(x_BSD: Tensor, linears: Sequence[Linear]) -> list[Tensor]:
    """Computes the linears that have the same input: q, k and v, or gate and up."""
    return [linear(x_BSD) for linear in linears]


def finish(x_BSF: Tensor, linear: Linear) -> Tensor:
    """Computes the linear at the end of attention (o) or MLP (down)."""
    return linear(x_BSF)


def split_heads(q_BSHN: Tensor, k_BSKN: Tensor, v_BSKN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Before attention: returns all tokens of the heads whose attention this rank computes; here, these are all heads."""
    return q_BSHN, k_BSKN, v_BSKN


def join_heads(out_BSHN: Tensor) -> Tensor:
    """After attention: the inverse of ``split_heads``."""
    return out_BSHN


def own_heads(values: list[float]) -> list[float]:
    """Selects, from one value per head, those of the heads whose attention this rank computes; here, these are all heads."""
    return values


def look_up(tokens_BS: Tensor, weight_VD: Tensor) -> Tensor:
    """Returns the tokens' rows of the embedding [B, S, D]."""
    return F.embedding(tokens_BS, weight_VD)


def logits(x_BSD: Tensor, weight_VD: Tensor) -> Tensor:
    """Computes the logits [B, S, V]."""
    return F.linear(x_BSD, weight_VD)


def loss(x_BSD: Tensor, weight_VD: Tensor, labels_BS: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """Computes the sum of the losses, and the loss of each token [B, S]. Arguments as for ``ops.linear_cross_entropy``."""
    total, losses = ops.linear_cross_entropy(x_BSD.flatten(0, 1), weight_VD, labels_BS.flatten(), smoothing)
    return total, losses.view(labels_BS.shape)


# ---------------------------------------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """y = x / rms(x) * weight, or x / rms(x) * (1 + weight) with ``unit_offset``."""

    def __init__(self, size: int, eps: float, unit_offset: bool = False, axis: str = "embed") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.axes = (axis,)
        self.eps, self.unit_offset = eps, unit_offset

    def forward(self, x_BSD: Tensor) -> Tensor:
        return ops.rms_norm(x_BSD, self.weight, self.eps, self.unit_offset)


def unchanged(x: Tensor) -> Tensor:
    """Returns x: no norm."""
    return x


def scale_gradient(x: Tensor, scale: float) -> Tensor:
    """Returns x. In the backward pass, its gradient is multiplied by ``scale`` (https://arxiv.org/abs/2210.02414, section
    3.2)."""
    return x if scale == 1.0 else x * scale + x.detach() * (1 - scale)


class Embedding(nn.Module):
    """The embedding of tokens, multiplied by ``scale``; its gradient is multiplied by ``grad_scale``."""

    def __init__(self, vocab_size: int, size: int, scale: float = 1.0, grad_scale: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, size))
        self.axes = ("vocab", "embed")
        self.scale, self.grad_scale = scale, grad_scale
        self.look_up = look_up

    def forward(self, tokens_BS: Tensor) -> Tensor:
        x_BSD = scale_gradient(self.look_up(tokens_BS, self.weight), self.grad_scale)
        # The factor is rounded to the weight's dtype, as in Hugging Face's models: 55.5 for sqrt(3072) in bf16.
        return x_BSD if self.scale == 1.0 else x_BSD * torch.tensor(self.scale, dtype=x_BSD.dtype, device=x_BSD.device)


class Head(nn.Module):
    """Computes the logits of the next token, or with labels the loss, for which the logits never exist all at once."""

    def __init__(self, vocab_size: int, size: int, normalized: bool = False, grad_scale: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, size))
        self.axes = ("vocab", "embed")
        self.normalized, self.grad_scale = normalized, grad_scale
        self.logits, self.loss, self.whole_rows = logits, loss, lambda weight: weight

    def forward(self, x_BSD: Tensor, labels_BS: Tensor | None = None, smoothing: float = 0.0) -> Tensor | tuple[Tensor, Tensor]:
        """Returns the logits [B, S, V]; or with labels the sum of the losses (differentiable) and the loss of each token (fp32
        [B, S], 0 where the label is -100)."""
        weight = scale_gradient(self.whole_rows(self.weight), self.grad_scale)
        if self.normalized:  # NormHead, section 2.4 of https://arxiv.org/abs/2309.10305
            weight = F.normalize(weight.float(), dim=1).to(weight.dtype)
        if labels_BS is None:
            return self.logits(x_BSD, weight)
        return self.loss(x_BSD, weight, labels_BS, smoothing)


class Attention(nn.Module):
    """Grouped-query attention with a rotary embedding or ALiBi."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.head_dim, self.window, self.query_scale = config.head_dim, config.window(layer), config.query_scale
        self.kv_heads = config.num_kv_heads
        """Number of the key/value heads whose attention this rank computes; a cache has this many."""
        d, heads, kv = config.hidden_size, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q = Linear("heads", heads, "embed", d, bias=config.qkv_bias)
        self.k = Linear("kv_heads", kv, "embed", d, bias=config.qkv_bias)
        self.v = Linear("kv_heads", kv, "embed", d, bias=config.qkv_bias)
        self.o = Linear("embed", d, "heads", heads, bias=config.o_bias)
        norm = partial(RMSNorm, config.head_dim, config.norm_eps, config.norm_unit_offset, axis="head")
        self.q_norm, self.k_norm = (norm() if config.qk_norm else None for _ in "qk")
        self.interleaved = config.rope is not None and config.rope.interleaved
        self.slopes = None if config.rope else alibi_slopes(config.num_heads)
        self.project, self.finish, self.split_heads, self.join_heads = project, finish, split_heads, join_heads
        self.own_heads = own_heads

    def forward(self, x_BSD: Tensor, context: Context, cache: Cache | None = None) -> Tensor:
        q, k, v = self.project(x_BSD, (self.q, self.k, self.v))
        q_BSHN, k_BSKN, v_BSKN = (part.view(*part.shape[:2], -1, self.head_dim) for part in (q, k, v))
        if self.q_norm is not None and self.k_norm is not None:
            q_BSHN, k_BSKN = self.q_norm(q_BSHN), self.k_norm(k_BSKN)
        if self.query_scale != 1.0:
            q_BSHN = q_BSHN * self.query_scale
        q_BSHN, k_BSKN, v_BSKN = self.split_heads(q_BSHN, k_BSKN, v_BSKN)
        if context.cos is not None and context.sin is not None:
            q_BSHN, k_BSKN = (rotate(x, context.cos, context.sin, self.interleaved) for x in (q_BSHN, k_BSKN))
        if cache is not None:
            end = cache.length + k_BSKN.shape[1]
            cache.keys[:, cache.length : end] = k_BSKN
            cache.values[:, cache.length : end] = v_BSKN
            k_BSKN, v_BSKN = cache.keys[:, :end], cache.values[:, :end]
        slopes_H = None if self.slopes is None else torch.tensor(self.own_heads(self.slopes), device=x_BSD.device)
        out_BSHN = ops.attention(
            q_BSHN, k_BSKN, v_BSKN, context.cu_seqlens, context.max_seqlen, window=self.window, slopes_H=slopes_H,
            first_B=None if cache is None else cache.first,
        )  # fmt: skip
        return self.finish(self.join_heads(out_BSHN).flatten(2), self.o)


def alibi_slopes(heads: int) -> list[float]:
    """Returns the slope of each head in ALiBi (https://arxiv.org/abs/2108.12409).

    The slopes of 2^n heads are a geometric series. For another number of heads, they are the slopes for the next smaller power
    of two, followed by every second slope for the next larger power of two.
    """
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8 * (i + 1) / power) for i in range(power)]
    return slopes + [2.0 ** (-4 * (2 * j + 1) / power) for j in range(heads - power)]


class GatedMLP(nn.Module):
    """The gated MLP: down(activation(gate(x)) * up(x))."""

    def __init__(self, config: DecoderConfig, width: int) -> None:
        super().__init__()
        d, bias, self.activation = config.hidden_size, config.mlp_bias, config.activation
        self.gate = Linear("mlp", width, "embed", d, bias=bias)
        self.up = Linear("mlp", width, "embed", d, bias=bias)
        self.down = Linear("embed", d, "mlp", width, bias=bias)
        self.project, self.finish = project, finish

    def forward(self, x_BSD: Tensor) -> Tensor:
        gate_BSF, up_BSF = self.project(x_BSD, (self.gate, self.up))
        return self.finish(ops.gated(gate_BSF, up_BSF, self.activation), self.down)


def make_mlp(config: DecoderConfig, layer: int) -> GatedMLP | MoE:
    """Makes a layer's MLP or its experts."""
    experts = config.experts
    if experts is None or not config.is_sparse(layer):
        return GatedMLP(config, config.intermediate_size)
    if not experts.shared_size:
        return MoE(config, experts, None, None)
    return MoE(config, experts, GatedMLP(config, experts.shared_size), Linear("one", 1, "embed", config.hidden_size))


class DecoderLayer(nn.Module):
    """A decoder layer: x += attention(norm(x)), and then x += mlp(norm(x)). With ``out_norms``, the
    outputs of both go through one more norm."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        norm = partial(RMSNorm, config.hidden_size, config.norm_eps, config.norm_unit_offset)
        self.attn_norm = norm()
        self.attn = Attention(config, layer)
        self.mlp_norm = norm()
        self.mlp = make_mlp(config, layer)
        self.attn_out_norm: Callable[[Tensor], Tensor] = norm() if config.out_norms else unchanged
        self.mlp_out_norm: Callable[[Tensor], Tensor] = norm() if config.out_norms else unchanged

    def forward(self, x_BSD: Tensor, context: Context, cache: Cache | None = None) -> tuple[Tensor, Routing | None]:
        """Returns the new residual stream, and in a layer with experts the sums of the router."""
        x_BSD = x_BSD + self.attn_out_norm(self.attn(self.attn_norm(x_BSD), context, cache))
        out = self.mlp(self.mlp_norm(x_BSD))
        out_BSD, routing = out if isinstance(out, tuple) else (out, None)
        return x_BSD + self.mlp_out_norm(out_BSD), routing
