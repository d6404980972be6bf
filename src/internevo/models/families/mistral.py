"""Mistral: Llama without biases. In 7B v0.1 every layer has the same sliding window; later models have none, and a head size of
their own (Nemo, Small)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ...config.model import Model
from ...errors import UsageError
from ..config import DecoderConfig
from . import choices, llama, qwen2

FAMILY = "MISTRAL"
ARCHITECTURE = "MistralForCausalLM"
HF_MODEL_TYPE = "mistral"
HEAD = llama.HEAD
FIXED: choices.Allowed = {**llama.FIXED, **choices.HF_WINDOWS, "attention_dropout": (0.0, None)}
names = llama.names


def problems(model: Model) -> Iterator[str]:
    """Yields what does not fit this family in a config's ``model`` section."""
    yield from choices.problems(model, FAMILY, choices.SLIDING_WINDOW)
    yield from choices.no_attention_biases(model, FAMILY)


def from_section(model: Model) -> DecoderConfig:
    """Returns the decoder that a config's ``model`` section describes."""
    return replace(llama.from_section(model), family=FAMILY, windows=qwen2.section_windows(model))


def from_hf(hf: dict[str, Any]) -> DecoderConfig:
    """Returns the decoder that a Hugging Face ``config.json`` describes.

    Raises:
        UsageError: if only some layers have the window, as in other models with the same tensors.
    """
    defaults = {"max_position_embeddings": 131072, "num_key_value_heads": 8}
    values = {**defaults, **hf, "attention_bias": False, "mlp_bias": False}
    window = hf.get("sliding_window", 4096 if choices.is_own(hf, HF_MODEL_TYPE) else None)
    if hf.get("use_sliding_window") is False:
        window = None
    if window and "full_attention" in (hf.get("layer_types") or ()):
        raise UsageError(f"layer_types has layers without a window, and in {FAMILY} all have one (sliding_window = {window})")
    windows = qwen2.windows_from(hf["num_hidden_layers"], window, 0) if window else ()
    return replace(llama.from_hf(values), family=FAMILY, windows=windows)


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Returns the Hugging Face ``config.json`` of a decoder."""
    return {
        **llama.common_to_hf(config, ARCHITECTURE, HF_MODEL_TYPE),
        "head_dim": config.head_dim,
        "sliding_window": config.windows[0] if config.windows else None,
    }
