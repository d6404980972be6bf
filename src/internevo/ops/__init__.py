"""Kernels. The fastest one for the device is chosen here and nowhere else."""

from .attention import attention
from .cross_entropy import VocabShard, chunk_tokens, linear_cross_entropy
from .gated import gated
from .grouped import grouped_linear, grouped_product, inverse, take_rows
from .norm import rms_norm
from .on_device import on_device

__all__ = [
    "VocabShard",
    "attention",
    "chunk_tokens",
    "gated",
    "grouped_linear",
    "grouped_product",
    "inverse",
    "linear_cross_entropy",
    "on_device",
    "rms_norm",
    "take_rows",
]
