"""Model families: single-device mathematics, without process groups or config machinery."""

from .config import DecoderConfig, Rope
from .decoder import Decoder
from .init import Initializer
from .registry import FAMILIES, decoder_config, decoder_from_hf, family

__all__ = ["FAMILIES", "Decoder", "DecoderConfig", "Initializer", "Rope", "decoder_config", "decoder_from_hf", "family"]
