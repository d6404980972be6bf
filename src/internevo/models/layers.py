"""The layers that every family is made of: plain single-device mathematics.

Each weight names its axes (``vocab``, ``embed``, ``heads``, ``kv_heads``, ``mlp``), from which initial weights follow
and by which a strategy knows what may be cut.

Shapes: B rows, S tokens, D hidden, H query heads, K key/value heads, N head size, F width of the MLP, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from .config import DecoderConfig
from .rotary import rotate


class Context(NamedTuple):
    """What every layer of one forward pass shares."""

    cos: Tensor
    """[B, S, 1, N/2]"""
    sin: Tensor
    cu_seqlens: Tensor | None = None
    """int32 [documents + 1]: borders of the documents in one packed row."""
    max_seqlen: int = 0
    """An upper bound of a document's length."""


class Cache(NamedTuple):
    """Keys and values of the tokens before, one layer's: [B, capacity, K, N], of which ``length`` are filled."""

    keys: Tensor
    values: Tensor
    length: int


class Linear(nn.Linear):
    """y = x W^T + b, whose weight [out, in] has named axes."""

    def __init__(self, out_axis: str, out_size: int, in_axis: str, in_size: int, bias: bool = False) -> None:
        super().__init__(in_size, out_size, bias=bias)
        self.axes = (out_axis, in_axis)


class RMSNorm(nn.Module):
    """y = x / rms(x) * weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.axes = ("embed",)
        self.eps = eps

    def forward(self, x_BSD: Tensor) -> Tensor:
        return ops.rms_norm(x_BSD, self.weight, self.eps)


def scale_gradient(x: Tensor, scale: float) -> Tensor:
    """x, whose gradient is multiplied by ``scale`` (https://arxiv.org/abs/2210.02414, section 3.2)."""
    return x if scale == 1.0 else x * scale + x.detach() * (1 - scale)


class Embedding(nn.Module):
    """Rows of a table."""

    def __init__(self, vocab_size: int, size: int, grad_scale: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, size))
        self.axes = ("vocab", "embed")
        self.grad_scale = grad_scale

    def forward(self, tokens_BS: Tensor) -> Tensor:
        return scale_gradient(F.embedding(tokens_BS, self.weight), self.grad_scale)


class Head(nn.Module):
    """Logits of the next token, or the loss against labels without ever holding all logits."""

    def __init__(self, vocab_size: int, size: int, grad_scale: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, size))
        self.axes = ("vocab", "embed")
        self.grad_scale = grad_scale

    def forward(self, x_BSD: Tensor, labels_BS: Tensor | None = None, smoothing: float = 0.0) -> Tensor | tuple[Tensor, Tensor]:
        """Logits [B, S, V]; or, with labels, the sum of the losses (differentiable) and each token's loss [B, S] (fp32, 0 where
        the label is -100)."""
        weight = scale_gradient(self.weight, self.grad_scale)
        if labels_BS is None:
            return F.linear(x_BSD, weight)
        total, losses = ops.linear_cross_entropy(x_BSD.flatten(0, 1), weight, labels_BS.flatten(), smoothing)
        return total, losses.view(labels_BS.shape)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        d, heads, kv = config.hidden_size, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q = Linear("heads", heads, "embed", d, bias=config.qkv_bias)
        self.k = Linear("kv_heads", kv, "embed", d, bias=config.qkv_bias)
        self.v = Linear("kv_heads", kv, "embed", d, bias=config.qkv_bias)
        self.o = Linear("embed", d, "heads", heads, bias=config.o_bias)

    def forward(self, x_BSD: Tensor, context: Context, cache: Cache | None = None) -> Tensor:
        split = (*x_BSD.shape[:2], -1, self.head_dim)
        q_BSHN = rotate(self.q(x_BSD).view(split), context.cos, context.sin)
        k_BSKN = rotate(self.k(x_BSD).view(split), context.cos, context.sin)
        v_BSKN = self.v(x_BSD).view(split)
        if cache is not None:
            end = cache.length + x_BSD.shape[1]
            cache.keys[:, cache.length : end] = k_BSKN
            cache.values[:, cache.length : end] = v_BSKN
            k_BSKN, v_BSKN = cache.keys[:, :end], cache.values[:, :end]
        out_BSHN = ops.attention(q_BSHN, k_BSKN, v_BSKN, context.cu_seqlens, context.max_seqlen)
        return self.o(out_BSHN.flatten(2))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        d, f, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate = Linear("mlp", f, "embed", d, bias=bias)
        self.up = Linear("mlp", f, "embed", d, bias=bias)
        self.down = Linear("embed", d, "mlp", f, bias=bias)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.down(ops.swiglu(self.gate(x_BSD), self.up(x_BSD)))


class DecoderLayer(nn.Module):
    """x += attention(norm(x)); x += mlp(norm(x))."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attn = Attention(config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x_BSD: Tensor, context: Context, cache: Cache | None = None) -> Tensor:
        x_BSD = x_BSD + self.attn(self.attn_norm(x_BSD), context, cache)
        return x_BSD + self.mlp(self.mlp_norm(x_BSD))
