"""Qwen3: Qwen2 without biases, with norms of queries and keys, and with its own head size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ...config.model import Model
from ..config import DecoderConfig
from . import choices, llama, qwen2

FAMILY = "QWEN3"
ARCHITECTURE = "Qwen3ForCausalLM"
HF_MODEL_TYPE = "qwen3"
HEAD = llama.HEAD
FIXED = {**llama.FIXED, **choices.HF_WINDOWS}
names = llama.names


def problems(model: Model) -> Iterator[str]:
    """Yields what does not fit this family in a config's ``model`` section."""
    return choices.problems(model, FAMILY, {**choices.MLP_BIAS, **choices.SLIDING_WINDOW})


def from_section(model: Model) -> DecoderConfig:
    """Returns the decoder that a config's ``model`` section describes."""
    return replace(llama.from_section(model), family=FAMILY, qk_norm=True, windows=qwen2.section_windows(model))


def from_hf(hf: dict[str, Any]) -> DecoderConfig:
    """Returns the decoder that a Hugging Face ``config.json`` describes. ``attention_bias`` is for q, k, v and o."""
    plain = llama.from_hf({"head_dim": 128, "max_position_embeddings": 32768, **hf})
    return replace(plain, family=FAMILY, qk_norm=True, mlp_bias=False, windows=qwen2.hf_windows(hf))


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Returns the Hugging Face ``config.json`` of a decoder."""
    return {
        **llama.common_to_hf(config, ARCHITECTURE, HF_MODEL_TYPE),
        **qwen2.windows_to_hf(config),
        "attention_bias": config.qkv_bias,
        "head_dim": config.head_dim,
    }
