"""Gemma 2: Gemma with norms after attention and MLP, caps of the scores of attention and of the logits, and a sliding window in
every second layer (https://arxiv.org/abs/2408.00118)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ...config.model import Model
from ..config import DecoderConfig
from . import choices, gemma, gemma3, llama

FAMILY = "GEMMA2"
ARCHITECTURE = "Gemma2ForCausalLM"
HF_MODEL_TYPE = "gemma2"
HEAD = llama.HEAD
PATTERN = 2
"""Every second layer has no window."""
CAPS: choices.Allowed = dict.fromkeys(
    ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"), choices.ANY_VALUE
)
"""Options of the scores and the logits, which have the same names in a config's ``model`` section and in ``config.json``."""
FIXED: choices.Allowed = {**gemma.FIXED, **choices.HF_WINDOWS, **CAPS, "attention_dropout": (0.0, None)}
ATTENTION_CAP, LOGIT_CAP = 50.0, 30.0
DIFFERENCES: dict[str, Any] = {**gemma.DIFFERENCES, "family": FAMILY, "out_norms": True}
names = gemma3.names


def problems(model: Model) -> Iterator[str]:
    """Yields what does not fit this family in a config's ``model`` section."""
    yield from choices.problems(model, FAMILY, {**gemma3.ALLOWED, **CAPS})
    yield from gemma3.max_window_layers(model, FAMILY, "every second layer")


def from_section(model: Model) -> DecoderConfig:
    """Returns the decoder that a config's ``model`` section describes. By default the head is tied to the embedding, and the
    window is 4096 tokens."""
    plain = llama.from_section(model)
    attention_cap, logit_cap = model.attn_logit_softcapping, model.final_logit_softcapping
    return replace(
        plain,
        tie_embeddings=model.tie_word_embeddings is not False,
        windows=gemma3.windows(model.num_layers, gemma3.section_window(model, 4096), PATTERN),
        query_scale=gemma3.query_scale(plain.head_dim, model.query_pre_attn_scalar),
        attention_softcap=ATTENTION_CAP if attention_cap is None else attention_cap,
        logit_softcap=LOGIT_CAP if logit_cap is None else logit_cap,
        **DIFFERENCES,
    )


def from_hf(hf: dict[str, Any]) -> DecoderConfig:
    """Returns the decoder that a Hugging Face ``config.json`` describes. A cap of null is none."""
    defaults = {
        "tie_word_embeddings": True, "head_dim": 256, "max_position_embeddings": 8192, "num_key_value_heads": 4,
        "sliding_window": 4096, "query_pre_attn_scalar": 256, "mlp_bias": False,
    }  # fmt: skip
    values = {**defaults, **hf}
    plain = replace(llama.from_hf(values), **DIFFERENCES)
    return replace(
        plain,
        windows=gemma3.hf_windows(values, PATTERN),
        query_scale=gemma3.query_scale(plain.head_dim, values["query_pre_attn_scalar"]),
        attention_softcap=values.get("attn_logit_softcapping", ATTENTION_CAP) or 0.0,
        logit_softcap=values.get("final_logit_softcapping", LOGIT_CAP) or 0.0,
    )


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Returns the Hugging Face ``config.json`` of a decoder."""
    return {
        **gemma.to_hf(config),
        **gemma3.windows_to_hf(config),
        "architectures": [ARCHITECTURE],
        "model_type": HF_MODEL_TYPE,
        "query_pre_attn_scalar": config.query_scalar,
        "attn_logit_softcapping": config.attention_softcap or None,
        "final_logit_softcapping": config.logit_softcap or None,
    }
