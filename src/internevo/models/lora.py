"""Which linears of a model have an adapter, and what is trained then."""

from __future__ import annotations

from torch import nn

from .config import Lora
from .layers import DecoderLayer
from .linear import MARK, Adapter, Linear


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
