"""The layers that all families consist of, as mathematics on a single device.

Each weight names its axes (``vocab``, ``embed``, ``heads``, ``kv_heads``, ``mlp``, ``expert``). They tell a strategy along
which dimensions the weight may be sharded.

Shapes: B rows, S tokens, D hidden, H query heads, K key/value heads, N head size, F width of the MLP, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache, partial
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
    """What all layers with the same rotary embedding, or without one, share in one forward pass."""

    cos: Tensor | None
    """cos of the angles of the rotary embedding [B, S, 1, R/2]; R elements of a head rotate. None: no rotary embedding."""
    sin: Tensor | None
    cu_seqlens: Tensor | None = None
    """Where the documents of one packed row begin and end, int32 [documents + 1]."""
    max_seqlen: int = 0
    """An upper bound of the length of a document."""
    slopes: Tensor | None = None
    """The slopes of ALiBi of all heads, fp32 [H]."""


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


def all_queries(x_BS: Tensor) -> Tensor:
    """Selects, from one value per token, those of the tokens whose queries this rank computes; here, these are all tokens."""
    return x_BS


def own_heads(values: Tensor) -> Tensor:
    """Selects, from one value per head, those of the heads whose attention this rank computes; here, these are all heads."""
    return values


def look_up(tokens_BS: Tensor, weight_VD: Tensor) -> Tensor:
    """Returns the tokens' rows of the embedding [B, S, D]."""
    return F.embedding(tokens_BS, weight_VD)


def logits(x_BSD: Tensor, weight_VD: Tensor) -> Tensor:
    """Computes the logits [B, S, V]."""
    return F.linear(x_BSD, weight_VD)


def loss(x_BSD: Tensor, weight_VD: Tensor, labels_BS: Tensor, smoothing: float, softcap: float = 0.0) -> tuple[Tensor, Tensor]:
    """Computes the sum of the losses, and the loss of each token [B, S]. Arguments as for ``ops.linear_cross_entropy``."""
    total, losses = ops.linear_cross_entropy(x_BSD.flatten(0, 1), weight_VD, labels_BS.flatten(), smoothing, softcap)
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
    return x if scale == 1.0 else _ScaleGradient.apply(x, scale)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, scale: float):  # type: ignore[no-untyped-def]
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        return grad * ctx.scale, None


@cache
def rounded(number: float, dtype: torch.dtype) -> float:
    """Returns the number of a dtype that is nearest."""
    return torch.tensor(number, dtype=dtype, device="cpu").item()


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
        return x_BSD if self.scale == 1.0 else x_BSD * rounded(self.scale, x_BSD.dtype)


class Head(nn.Module):
    """Computes the logits of the next token, or with labels the loss, for which the logits never exist all at once.

    With ``softcap``, logits z become softcap * tanh(z / softcap).
    """

    def __init__(
        self, vocab_size: int, size: int, normalized: bool = False, grad_scale: float = 1.0, softcap: float = 0.0
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, size))
        self.axes = ("vocab", "embed")
        self.normalized, self.grad_scale, self.softcap = normalized, grad_scale, softcap
        self.logits, self.loss, self.whole_rows = logits, loss, lambda weight: weight

    def forward(self, x_BSD: Tensor, labels_BS: Tensor | None = None, smoothing: float = 0.0) -> Tensor | tuple[Tensor, Tensor]:
        """Returns the logits [B, S, V]; or with labels the sum of the losses (differentiable) and the loss of each token (fp32
        [B, S], 0 where the label is -100)."""
        weight = scale_gradient(self.whole_rows(self.weight), self.grad_scale)
        if self.normalized:  # NormHead, section 2.4 of https://arxiv.org/abs/2309.10305
            weight = F.normalize(weight.float(), dim=1).to(weight.dtype)
        if labels_BS is None:
            logits_BSV = self.logits(x_BSD, weight)
            return self.softcap * torch.tanh(logits_BSV / self.softcap) if self.softcap else logits_BSV
        return self.loss(x_BSD, weight, labels_BS, smoothing, self.softcap)


class Attention(nn.Module):
    """Grouped-query attention with a rotary embedding or ALiBi."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        self.head_dim, self.window = config.head_dim, config.window(layer)
        scale = config.attention_multiplier
        self.query_scale = config.query_scale if scale is None else scale * math.sqrt(config.head_dim)
        self.softcap = config.attention_softcap
        self.kv_heads = config.num_kv_heads
        """Number of the key/value heads whose attention this rank computes; a cache has this many."""
        d, heads, kv = config.hidden_size, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q = Linear("heads", heads, "embed", d, bias=config.qkv_bias)
        self.k = Linear("kv_heads", kv, "embed", d, bias=config.qkv_bias)
        self.v = Linear("kv_heads", kv, "embed", d, bias=config.qkv_bias)
        self.o = Linear("embed", d, "heads", heads, bias=config.o_bias)
        norm = partial(RMSNorm, config.head_dim, config.norm_eps, config.norm_unit_offset, axis="head")
        self.q_norm, self.k_norm = (norm() if config.qk_norm else None for _ in "qk")
        self.rotates = config.rotary(layer) != "none"
        self.interleaved = config.rope is not None and config.rope.interleaved
        self.project, self.finish, self.split_heads, self.join_heads = project, finish, split_heads, join_heads
        self.own_heads, self.attend = own_heads, ops.attention

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
            k_BSKN, v_BSKN = add_to_cache(cache, k_BSKN, v_BSKN)
        slopes_H = None if context.slopes is None else self.own_heads(context.slopes)
        out_BSHN = self.attend(
            q_BSHN, k_BSKN, v_BSKN, context.cu_seqlens, context.max_seqlen, window=self.window, slopes_H=slopes_H,
            softcap=self.softcap, first_B=None if cache is None else cache.first,
        )  # fmt: skip
        return self.finish(self.join_heads(out_BSHN).flatten(2), self.o)


def alibi_slopes(heads: int, device: torch.device) -> Tensor:
    """Returns the slope of each head in ALiBi, fp32 [H] (https://arxiv.org/abs/2108.12409).

    The slopes of 2^n heads are a geometric series. For another number of heads, they are the slopes for the next smaller power
    of two, followed by every second slope for the next larger power of two.
    """
    power = 2 ** math.floor(math.log2(heads))
    # On the device, because a copy from the host would wait for it.
    number = torch.arange(heads, dtype=torch.float64, device=device)
    exponents = torch.where(number < power, -8 * (number + 1) / power, -4 * (2 * (number - power) + 1) / power)
    return exponents.exp2().float()


def add_to_cache(cache: Cache, k_BSKN: Tensor, v_BSKN: Tensor) -> tuple[Tensor, Tensor]:
    """Writes the keys and values of new tokens into the cache, and returns those of all tokens so far."""
    end = cache.length + k_BSKN.shape[1]
    cache.keys[:, cache.length : end] = k_BSKN
    cache.values[:, cache.length : end] = v_BSKN
    return cache.keys[:, :end], cache.values[:, :end]


def share_latents(parts: Sequence[Tensor]) -> Sequence[Tensor]:
    """Makes what the heads of this rank are computed from: all tokens; here, they are all there."""
    return parts


LATENT_EPS = 1e-6
"""Number that is added to the mean square in the norms of latents, whatever it is in other norms."""


class LatentAttention(nn.Module):
    """Multi-head latent attention (``Latent``): ``q_a`` and ``kv_a`` compute latents, from which ``q`` and ``kv`` compute the
    queries, and the keys and values, of every head. Values are padded with zeros to the size of keys, since kernels have one
    size."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        assert config.latent is not None
        self.latent, self.head_dim, self.window = config.latent, config.head_dim, config.window(layer)
        self.interleaved = config.rope is not None and config.rope.interleaved
        self.query_scale = config.rope.latent_scale if config.rope else 1.0
        self.kv_heads = config.num_heads
        """Number of the heads whose attention this rank computes; a cache has this many."""
        d, rank, query_rank = config.hidden_size, config.latent.rank, config.latent.query_rank
        size = config.projections()
        norm = partial(RMSNorm, eps=LATENT_EPS, axis="latent")
        self.q_a = Linear("latent", query_rank, "embed", d, bias=config.qkv_bias) if query_rank else None
        self.q_a_norm = norm(query_rank) if query_rank else None
        self.q = Linear("heads", size["q"].outputs, *(("latent", query_rank) if query_rank else ("embed", d)))
        self.kv_a = Linear("latent", size["kv_a"].outputs, "embed", d, bias=config.qkv_bias)
        self.kv_a_norm = norm(rank)
        self.kv = Linear("heads", size["kv"].outputs, "latent", rank)
        self.o = Linear("embed", d, "heads", size["o"].inputs, bias=config.o_bias)
        self.project, self.project_q, self.project_kv, self.finish = project, project, project, finish
        self.share_latents, self.split_heads, self.join_heads = share_latents, split_heads, join_heads
        self.attend = ops.attention

    def forward(self, x_BSD: Tensor, context: Context, cache: Cache | None = None) -> Tensor:
        plain, rotary, value = self.latent.plain_dim, self.latent.rotary_dim, self.latent.value_dim
        if self.q_a is None or self.q_a_norm is None:
            q_BSR, (kv_BSR,) = x_BSD, self.project(x_BSD, (self.kv_a,))
        else:
            q_BSR, kv_BSR = self.project(x_BSD, (self.q_a, self.kv_a))
            q_BSR = self.q_a_norm(q_BSR)
        kv_BSR, rotary_BSR = kv_BSR.split([self.latent.rank, rotary], dim=-1)
        q_BSR, kv_BSR, rotary_BSR = self.share_latents((q_BSR, self.kv_a_norm(kv_BSR), rotary_BSR))
        (q_BSF,), (kv_BSF,) = self.project_q(q_BSR, (self.q,)), self.project_kv(kv_BSR, (self.kv,))
        q_BSHN, kv_BSHN = q_BSF.unflatten(-1, (-1, self.head_dim)), kv_BSF.unflatten(-1, (-1, plain + value))
        k_BSHN, v_BSHN = kv_BSHN.split([plain, value], dim=-1)
        k_BSHN = torch.cat((k_BSHN, rotary_BSR.unsqueeze(2).expand(*k_BSHN.shape[:-1], rotary)), dim=-1)
        v_BSHN = F.pad(v_BSHN, (0, self.head_dim - value))
        if self.query_scale != 1.0:
            q_BSHN = q_BSHN * self.query_scale
        q_BSHN, k_BSHN, v_BSHN = self.split_heads(q_BSHN, k_BSHN, v_BSHN)
        q_BSHN, k_BSHN = (self._rotate(x, context) for x in (q_BSHN, k_BSHN))
        if cache is not None:
            k_BSHN, v_BSHN = add_to_cache(cache, k_BSHN, v_BSHN)
        out_BSHN = self.attend(
            q_BSHN, k_BSHN, v_BSHN, context.cu_seqlens, context.max_seqlen, window=self.window,
            first_B=None if cache is None else cache.first,
        )  # fmt: skip
        return self.finish(self.join_heads(out_BSHN[..., :value]).flatten(2), self.o)

    def _rotate(self, x_BSHN: Tensor, context: Context) -> Tensor:
        """Rotates the last elements of each head."""
        assert context.cos is not None
        assert context.sin is not None
        plain_BSHN, rotary_BSHN = x_BSHN.split([self.latent.plain_dim, self.latent.rotary_dim], dim=-1)
        return torch.cat((plain_BSHN, rotate(rotary_BSHN, context.cos, context.sin, self.interleaved)), dim=-1)


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
    gate = Linear("one", 1, "embed", config.hidden_size) if experts.shared_gate else None
    return MoE(config, experts, GatedMLP(config, experts.shared_size), gate)


class DecoderLayer(nn.Module):
    """A decoder layer: x += attention(norm(x)), and then x += mlp(norm(x)). With ``out_norms``, the outputs of both go through
    one more norm; with ``residual_multiplier``, they are multiplied by it."""

    def __init__(self, config: DecoderConfig, layer: int) -> None:
        super().__init__()
        norm = partial(RMSNorm, config.hidden_size, config.norm_eps, config.norm_unit_offset)
        self.attn_norm = norm()
        self.attn = LatentAttention(config, layer) if config.latent else Attention(config, layer)
        self.mlp_norm = norm()
        self.mlp = make_mlp(config, layer)
        self.multiplier = config.residual_multiplier
        self.attn_out_norm: Callable[[Tensor], Tensor] = norm() if config.out_norms else unchanged
        self.mlp_out_norm: Callable[[Tensor], Tensor] = norm() if config.out_norms else unchanged

    def forward(self, x_BSD: Tensor, context: Context, cache: Cache | None = None) -> tuple[Tensor, Routing | None]:
        """Returns the new residual stream, and in a layer with experts the sums of the router."""
        out_BSD = self.attn_out_norm(self.attn(self.attn_norm(x_BSD), context, cache))
        x_BSD = torch.add(x_BSD, out_BSD, alpha=self.multiplier)
        out = self.mlp(self.mlp_norm(x_BSD))
        out_BSD, routing = out if isinstance(out, tuple) else (out, None)
        return torch.add(x_BSD, self.mlp_out_norm(out_BSD), alpha=self.multiplier), routing
