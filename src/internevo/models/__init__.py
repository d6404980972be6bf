"""Model families: single-device mathematics, without process groups or config machinery."""

from .config import DecoderConfig, Experts, Rope
from .decoder import Decoder, parameter_shapes
from .init import Initializer
from .losses import Loss, LossTerms
from .registry import FAMILIES, decoder_config, decoder_from_hf, family

__all__ = [
    "FAMILIES",
    "Decoder",
    "DecoderConfig",
    "Experts",
    "Initializer",
    "Loss",
    "LossTerms",
    "Rope",
    "decoder_config",
    "decoder_from_hf",
    "family",
    "parameter_shapes",
]
