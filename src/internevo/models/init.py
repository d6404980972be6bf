"""Initial weights: each parameter is drawn from (seed, its name) for the full tensor's rows.

The draw knows no rank and no layout: rows come in blocks with a seed each, so that a rank that holds some rows makes
only those blocks, and every layout starts from the same weights.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config.model import Model

BLOCK = 1 << 20
"""Elements drawn from one seed (rounded down to whole rows, at least one)."""


@dataclass(frozen=True)
class Initializer:
    """Initial values of every parameter of a decoder."""

    seed: int
    std: Callable[[str], float | None]
    """Parameter name -> standard deviation, or None for norms (identity) and biases (zeros)."""
    uniform: bool = False
    norm_unit_offset: bool = False
    """Norms multiply by 1 + weight, so that 0 is the identity."""

    @classmethod
    def of(cls, model: Model, seed: int, norm_unit_offset: bool = False) -> Initializer:
        """As the config's ``model`` section says."""
        stds = {
            "embed": model.embedding_init_std,
            "head": model.out_head_init_std,
            "q": model.attn_wqkv_init_std,
            "k": model.attn_wqkv_init_std,
            "v": model.attn_wqkv_init_std,
            "o": model.attn_other_init_std,
            "gate": model.ffn_uplayer_init_std,
            "up": model.ffn_uplayer_init_std,
            "down": model.ffn_other_init_std,
            "router": model.ffn_uplayer_init_std,
            "shared_gate": model.ffn_uplayer_init_std,
        }

        def std(name: str) -> float | None:
            *path, module, kind = name.split(".")
            if kind == "bias" or "norm" in module or name.endswith(".lora.b.weight"):
                return None
            depth = int(path[1]) + 1 if model.use_scaled_init and module in ("o", "down") else 0
            return stds[module] / math.sqrt(2 * depth) if depth else stds[module]

        return cls(seed, std, model.init_type == "uniform", norm_unit_offset)

    def rows(self, name: str, shape: torch.Size, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of the full tensor of ``shape``, in fp32 on the host."""
        # Adapters: as Kaiming's uniform draw with a = sqrt(5) has it, and zeros.
        std = 1 / math.sqrt(3 * shape[1]) if name.endswith(".lora.a.weight") else self.std(name)
        if std is None:
            zero = name.endswith(("bias", ".lora.b.weight")) or self.norm_unit_offset
            return torch.full((stop - start, *shape[1:]), 0.0 if zero else 1.0)
        per_block = max(1, BLOCK // max(1, math.prod(shape[1:])))
        blocks = range(start // per_block, -(-stop // per_block))
        drawn = [self._block(name, b, (min(per_block, shape[0] - b * per_block), *shape[1:]), std) for b in blocks]
        first = blocks.start * per_block
        return torch.cat(drawn)[start - first : stop - first] if drawn else torch.empty(0, *shape[1:])

    def _block(self, name: str, number: int, shape: tuple[int, ...], std: float) -> Tensor:
        digest = hashlib.sha256(f"{self.seed}/{name}/{number}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
        if self.uniform:
            bound = math.sqrt(3) * std
            return torch.rand(shape, generator=generator).mul_(2 * bound).sub_(bound)
        return torch.randn(shape, generator=generator).mul_(std)
