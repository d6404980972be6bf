"""Initial weights, which do not depend on the layout.

The random numbers of a parameter depend only on the seed and the parameter's name. Its rows are divided into blocks, and each
block has its own seed. A rank draws only the blocks of the rows that it has, and every layout starts with the same weights.
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
"""Number of elements in a block, rounded down to whole rows (at least one row)."""


@dataclass(frozen=True)
class Initializer:
    """Draws the initial values of the parameters of a decoder."""

    seed: int
    std: Callable[[str], float | None]
    """Name of a parameter -> standard deviation; None for parameters that are not random (norms, biases)."""
    uniform: bool = False
    """Whether the distribution is uniform, and not normal."""
    norm_unit_offset: bool = False
    """Whether norms multiply by 1 + weight. Their initial weights are then 0, and not 1."""

    @classmethod
    def of(cls, model: Model, seed: int, norm_unit_offset: bool = False) -> Initializer:
        """Makes an initializer with the options of a config's ``model`` section."""
        stds = {
            "embed": model.embedding_init_std,
            "head": model.out_head_init_std,
            "q": model.attn_wqkv_init_std,
            "k": model.attn_wqkv_init_std,
            "v": model.attn_wqkv_init_std,
            "q_a": model.attn_wqkv_init_std,
            "kv_a": model.attn_wqkv_init_std,
            "kv": model.attn_wqkv_init_std,
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
        """Returns rows ``start`` to ``stop`` of the parameter ``name``, in fp32 on the host.

        Args:
            shape: the shape of the full parameter. Here, rows are along its first dimension.
        """
        # An adapter's A has the standard deviation of torch.nn.init.kaiming_uniform_ with a = sqrt(5); its B is zero.
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
