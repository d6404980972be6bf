"""Rotary position embedding (https://arxiv.org/abs/2104.09864), half-split, with the kinds of scaling of ``Rope``.

Shapes: B rows, S tokens, H heads, N head size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..ops import on_device
from .config import Rope


def rotate(x_BSHN: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotates the first R elements of each head: each pair (x_i, x_{i + R/2}) by its angle.

    Args:
        x_BSHN: queries or keys.
        cos, sin: [B, S, 1, R/2], in x's dtype.
        interleaved: the pairs are (x_{2i}, x_{2i + 1}).
    """
    size = 2 * cos.shape[-1]
    part, rest = x_BSHN[..., :size], x_BSHN[..., size:]
    a, b = part.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else part.chunk(2, dim=-1)
    turned = (a * cos - b * sin, b * cos + a * sin)
    out = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
    return out if size == x_BSHN.shape[-1] else torch.cat((out, rest), dim=-1)


def tables(
    rope: Rope, head_dim: int, max_positions: int, positions_BS: Tensor, lengths_BS: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Returns cos and sin of the angles of every token, [B, S, 1, R/2], computed in fp32 and cast to ``dtype``.

    Args:
        head_dim: N, of which R elements rotate.
        max_positions: the document length for which the rotary embedding is made.
        positions_BS: the position of each token in its document.
        lengths_BS: the length of each token's document; only some kinds of scaling need it (``NEED_LENGTHS``).
    """
    device, size = positions_BS.device, rope.size(head_dim)
    frequencies, scale = inverse_frequencies(rope, size, max_positions, device)
    if rope.kind == "dynamic":
        assert lengths_BS is not None
        frequencies = _dynamic(rope, size, max_positions, lengths_BS)
    elif rope.kind == "longrope":
        assert lengths_BS is not None
        frequencies, scale = _longrope(frequencies, rope, max_positions, lengths_BS)
    angles = positions_BS.float().unsqueeze(-1) * frequencies
    cos, sin = angles.cos() * scale, angles.sin() * scale
    return cos.unsqueeze(2).to(dtype), sin.unsqueeze(2).to(dtype)


NEED_LENGTHS = ("dynamic", "longrope")
"""The kinds of scaling that depend on the length of a document."""


def inverse_frequencies(rope: Rope, size: int, max_positions: int, device: torch.device) -> tuple[Tensor, float]:
    """Returns the angle per position of each pair, in radians [size/2], and the factor of cos and sin (1 except for yarn). Of
    the kinds that depend on the length of a document they are those without scaling."""
    plain = rope.base ** -(torch.arange(0, size, 2, dtype=torch.float32, device=device) / size)
    if rope.kind in ("default", *NEED_LENGTHS):
        return plain, 1.0
    if rope.kind == "linear":
        return plain / rope.factor, 1.0
    if rope.kind == "llama3":
        return _llama3(plain, rope, max_positions), 1.0
    return _yarn(plain, rope, size, max_positions)


def _dynamic(rope: Rope, head_dim: int, max_positions: int, lengths_BS: Tensor) -> Tensor:
    """Dynamic NTK scaling: for documents longer than ``max_positions``, the base grows with the length. Returns [B, S, N/2]."""
    stretch = (rope.factor * lengths_BS.float() / max_positions - (rope.factor - 1)).clamp(min=1.0)
    base = torch.where(lengths_BS > max_positions, rope.base * stretch ** (head_dim / (head_dim - 2)), rope.base)
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=lengths_BS.device) / head_dim
    return base.unsqueeze(-1) ** -exponents


def _longrope(plain: Tensor, rope: Rope, max_positions: int, lengths_BS: Tensor) -> tuple[Tensor, float]:
    """LongRoPE (https://arxiv.org/abs/2402.13753): each pair has a divisor of its own, and another one in documents that are
    longer than the original length. Returns [B, S, pairs], and the factor of cos and sin."""
    original = rope.options["original_max_position_embeddings"]
    short, long = (on_device(rope.options[key], plain.device, plain.dtype) for key in ("short_factor", "long_factor"))
    frequencies = torch.where((lengths_BS > original).unsqueeze(-1), plain / long, plain / short)
    return frequencies, longrope_scale(rope, max_positions)


def longrope_scale(rope: Rope, max_positions: int) -> float:
    """Returns LongRoPE's factor of cos and sin."""
    original = rope.options["original_max_position_embeddings"]
    factor = rope.factor if rope.factor > 1 else max_positions / original
    scale = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return float(rope.options.get("attention_factor", scale))


def _llama3(plain: Tensor, rope: Rope, max_positions: int) -> Tensor:
    """Scaling of Llama 3.1: low frequencies are divided by the factor, high ones are kept, and those between are mixed."""
    original = rope.options.get("original_max_position_embeddings", max_positions)
    low, high = rope.options["low_freq_factor"], rope.options["high_freq_factor"]
    wave = 2 * math.pi / plain
    mix = (original / wave - low) / (high - low)
    between = (1 - mix) * plain / rope.factor + mix * plain
    return torch.where(wave > original / low, plain / rope.factor, torch.where(wave < original / high, plain, between))


def _yarn(plain: Tensor, rope: Rope, head_dim: int, max_positions: int) -> tuple[Tensor, float]:
    """YaRN (https://arxiv.org/abs/2309.00071): high frequencies are kept, low ones are divided by the factor, and between them
    the change is linear in the number of the pair."""
    options, factor = rope.options, rope.factor
    original = options.get("original_max_position_embeddings", max_positions)

    def pair(rotations: float) -> float:
        """Returns the number of the pair that rotates ``rotations`` times within the original length."""
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.base))

    low, high = pair(options.get("beta_fast", 32.0)), pair(options.get("beta_slow", 1.0))
    if options.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high += 0.001 if low == high else 0
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32, device=plain.device) - low) / (high - low)).clamp(0, 1)
    return plain / factor * ramp + plain * (1 - ramp), _yarn_scale(factor, options)


def _yarn_scale(factor: float, options: dict[str, float]) -> float:
    def magnitude(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if options.get("attention_factor") is not None:
        return options["attention_factor"]
    if options.get("mscale") and options.get("mscale_all_dim"):
        return magnitude(options["mscale"]) / magnitude(options["mscale_all_dim"])
    return magnitude(1.0)
