"""Qwen3-MoE: Qwen3's attention and Qwen2-MoE's experts, without a shared expert."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ...config.model import Model
from ..config import DecoderConfig, Experts
from . import choices, experts, llama, qwen2moe, qwen3

FAMILY = "QWEN3MOE"
ARCHITECTURE = "Qwen3MoeForCausalLM"
HF_MODEL_TYPE = "qwen3_moe"
HEAD = llama.HEAD
FIXED = {**llama.FIXED, **choices.HF_WINDOWS}
names = qwen2moe.names


def problems(model: Model) -> Iterator[str]:
    """Yields what does not fit this family in a config's ``model`` section."""
    yield from experts.problems(model, FAMILY)


def from_section(model: Model) -> DecoderConfig:
    """Returns the decoder that a config's ``model`` section describes."""
    return replace(qwen3.from_section(model), family=FAMILY, experts=experts.from_section(model))


def from_hf(hf: dict[str, Any]) -> DecoderConfig:
    """Returns the decoder that a Hugging Face ``config.json`` describes. A window applies to every layer."""
    moe = Experts(
        count=experts.count(hf),
        top_k=hf.get("num_experts_per_tok", 8),
        size=hf.get("moe_intermediate_size", 768),
        normalize=hf.get("norm_topk_prob", False),
        dense_layers=experts.hf_dense_layers(hf),
    )
    window = hf.get("sliding_window", 4096) if hf.get("use_sliding_window") else 0
    windows = (window,) * hf["num_hidden_layers"] if window else ()
    plain = qwen3.from_hf({"head_dim": hf["hidden_size"] // hf["num_attention_heads"], **hf})
    return replace(plain, family=FAMILY, experts=moe, windows=windows)


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Returns the Hugging Face ``config.json`` of a decoder."""
    moe = experts.require(config, ARCHITECTURE)
    return {
        **qwen3.to_hf(config),
        "architectures": [ARCHITECTURE],
        "model_type": HF_MODEL_TYPE,
        **experts.to_hf(moe),
    }
