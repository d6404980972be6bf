"""Granite 3 (dense): Llama with multipliers of the embeddings, of the scores of attention, and of what each layer adds to the
residual stream; logits are divided by a number."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ...config.model import Model
from ..config import DecoderConfig
from . import choices, llama
from .hf_values import MULTIPLIERS

FAMILY = "GRANITE"
ARCHITECTURE = "GraniteForCausalLM"
HF_MODEL_TYPE = "granite"
HEAD = llama.HEAD
NUMBERS: choices.Allowed = dict.fromkeys(MULTIPLIERS, choices.ANY_VALUE)
"""They have the same names in a config's ``model`` section, in ``config.json`` and in ``DecoderConfig``."""
FIXED: choices.Allowed = {**llama.FIXED, **NUMBERS, "attention_dropout": (0.0, None)}
names = llama.names


def problems(model: Model) -> Iterator[str]:
    """Yields what does not fit this family in a config's ``model`` section."""
    return choices.problems(model, FAMILY, {**choices.MLP_BIAS, **NUMBERS})


def from_section(model: Model) -> DecoderConfig:
    """Returns the decoder that a config's ``model`` section describes."""
    numbers: dict[str, Any] = {name: getattr(model, name) for name in MULTIPLIERS}
    return _with_numbers(llama.from_section(model), numbers)


def from_hf(hf: dict[str, Any]) -> DecoderConfig:
    """Returns the decoder that a Hugging Face ``config.json`` describes. A missing multiplier is 1, also that of the scores."""
    default = 1.0 if choices.is_own(hf, HF_MODEL_TYPE) else None
    numbers: dict[str, Any] = {name: float(hf[name]) for name in MULTIPLIERS if hf.get(name) is not None}
    return _with_numbers(llama.from_hf(hf), {"attention_multiplier": default, **numbers})


def _with_numbers(plain: DecoderConfig, numbers: dict[str, Any]) -> DecoderConfig:
    """Returns a decoder with its numbers. The usual multiplier of the scores is None, as in other families."""
    if numbers["attention_multiplier"] == plain.score_multiplier:
        numbers = {**numbers, "attention_multiplier": None}
    return replace(plain, family=FAMILY, **numbers)


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Returns the Hugging Face ``config.json`` of a decoder."""
    return {
        **llama.to_hf(config),
        "architectures": [ARCHITECTURE],
        "model_type": HF_MODEL_TYPE,
        **{name: getattr(config, name) for name in MULTIPLIERS},
        "attention_multiplier": config.score_multiplier,
    }
