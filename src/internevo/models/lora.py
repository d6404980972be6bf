"""Adds LoRA adapters to a model, and freezes all other weights."""

from __future__ import annotations

from torch import nn

from .config import Lora
from .layers import DecoderLayer
from .linear import ADAPTER_INFIX, Adapter, Linear


def add_adapters(model: nn.Module, lora: Lora) -> None:
    """Adds an adapter to the linears that ``lora.targets`` names, in every layer."""
    for layer in model.modules():
        if isinstance(layer, DecoderLayer):
            for part in (layer.attn, layer.mlp):
                for name, linear in part.named_children():
                    if name in lora.targets and isinstance(linear, Linear):
                        linear.lora = Adapter(linear, lora.rank, lora.alpha)


def freeze_all_but_adapters(model: nn.Module) -> None:
    """Makes the adapters the only parameters that get gradients."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(ADAPTER_INFIX in name)
