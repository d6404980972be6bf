"""Gemma: Llama with gated GELU, norms with 1 + weight, embeddings multiplied by sqrt(hidden size), and a tied head."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ...config.model import Model
from ..config import DecoderConfig
from . import choices, llama

FAMILY = "GEMMA"
ARCHITECTURE = "GemmaForCausalLM"
HF_MODEL_TYPE = "gemma"
HEAD = llama.HEAD
GELU = ("gelu", "gelu_pytorch_tanh")
"""Both names mean the tanh approximation."""
FIXED: choices.Allowed = {"hidden_act": GELU, "hidden_activation": (*GELU, None)}
names = llama.names
DIFFERENCES: dict[str, Any] = {
    "family": FAMILY, "activation": "gelu_tanh", "norm_unit_offset": True, "scale_embedding": True, "mlp_bias": False,
}  # fmt: skip


def problems(model: Model) -> Iterator[str]:
    """Yields what does not fit this family in a config's ``model`` section."""
    return choices.problems(model, FAMILY, {"add_unit_offset": (None, True), "use_swiglu": (None, False)})


def from_section(model: Model) -> DecoderConfig:
    """Returns the decoder that a config's ``model`` section describes. By default the head is tied to the embedding."""
    return replace(llama.from_section(model), tie_embeddings=model.tie_word_embeddings is not False, **DIFFERENCES)


def from_hf(hf: dict[str, Any]) -> DecoderConfig:
    """Returns the decoder that a Hugging Face ``config.json`` describes. Published ones do not have ``tie_word_embeddings``."""
    defaults = {"tie_word_embeddings": True, "head_dim": 256, "max_position_embeddings": 8192}
    return replace(llama.from_hf({**defaults, **hf}), **DIFFERENCES)


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Returns the Hugging Face ``config.json`` of a decoder."""
    return {
        **llama.common_to_hf(config, ARCHITECTURE, HF_MODEL_TYPE),
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": config.qkv_bias,
        "head_dim": config.head_dim,
    }
