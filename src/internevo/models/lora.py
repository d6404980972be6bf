"""Low-rank adapters (LoRA, https://arxiv.org/abs/2106.09685): y = W x + alpha / rank * B A x, of which A and B are trained."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from .config import Lora
from .layers import DecoderLayer, Linear

MARK = ".lora."
"""In the names of the adapters' weights."""


def own(weight: Tensor) -> Tensor:
    """This rank's part of a weight; a strategy that cuts weights puts its own function in place of this."""
    return weight


class Adapter(nn.Module):
    """alpha / rank * B A x. B begins as zeros, so that the model begins as it was."""

    def __init__(self, linear: Linear, rank: int, alpha: float) -> None:
        super().__init__()
        out_axis, in_axis = linear.axes
        self.a = Linear("rank", rank, in_axis, linear.in_features)
        self.b = Linear(out_axis, linear.out_features, "rank", rank)
        self.scale = alpha / rank
        self.own: Callable[[Tensor], Tensor] = own

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.own(self.a.weight)), self.own(self.b.weight)) * self.scale


def add_adapters(model: nn.Module, lora: Lora) -> None:
    """Gives the linears that ``lora`` names an adapter, in every layer."""
    for layer in model.modules():
        if isinstance(layer, DecoderLayer):
            for part in (layer.attn, layer.mlp):
                for name, linear in part.named_children():
                    if name in lora.targets and isinstance(linear, Linear):
                        linear.lora = Adapter(linear, lora.rank, lora.alpha)


def freeze_all_but_adapters(model: nn.Module) -> None:
    """Only adapters get gradients."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(MARK in name)
