"""GLM-4 (9B, 2024): Llama with biases on q, k and v, of whose heads a half rotates, in pairs of neighbours. On disk, gate and
up are one weight."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ...config.model import Model
from ...config.rope import SHARE
from ..config import DecoderConfig, Rope
from ..huggingface.naming import Names
from . import choices, llama, phi3, qwen2

FAMILY = "GLM"
ARCHITECTURE = "GlmForCausalLM"
HF_MODEL_TYPE = "glm"
HEAD = llama.HEAD
PARTIAL_ROTARY = True
FIXED: choices.Allowed = {**llama.FIXED, "attention_dropout": (0.0, None)}


def problems(model: Model) -> Iterator[str]:
    """Yields what does not fit this family in a config's ``model`` section."""
    yield from choices.problems(model, FAMILY)
    yield from biases(model, FAMILY)


def biases(model: Model, family: str) -> Iterator[str]:
    """Yields options of biases that these families do not have: q, k and v may have biases, and o has none."""
    yield from qwen2.no_bias(model, family)
    if model.o_bias:
        yield f"model.o_bias = True is not supported by model_type = {family!r}; leave it out"


def from_section(model: Model) -> DecoderConfig:
    """Returns the decoder that a config's ``model`` section describes. By default, a half of each head rotates."""
    plain = llama.from_section(model)
    share = (model.rope_scaling or {}).get(SHARE) or 0.5
    return replace(
        plain,
        family=FAMILY,
        qkv_bias=model.qkv_bias is not False,
        o_bias=False,
        rope=replace(plain.rope or Rope(), share=share, interleaved=True),
    )


def from_hf(hf: dict[str, Any]) -> DecoderConfig:
    """Returns the decoder that a Hugging Face ``config.json`` describes. ``attention_bias`` is for q, k and v."""
    defaults = {
        "max_position_embeddings": 131072, "rms_norm_eps": 1.5625e-07, "num_key_value_heads": 2, "head_dim": 128,
        "attention_bias": True,
    }  # fmt: skip
    values = {**defaults, **hf, "mlp_bias": False}
    if values.get(SHARE) is None and SHARE not in (values.get("rope_parameters") or {}):
        values[SHARE] = 0.5
    plain = llama.from_hf(values)
    return replace(plain, family=FAMILY, o_bias=False, rope=replace(plain.rope or Rope(), interleaved=True))


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Returns the Hugging Face ``config.json`` of a decoder."""
    share = config.rope.share if config.rope else 1.0
    values = llama.common_to_hf(config, ARCHITECTURE, HF_MODEL_TYPE)
    return {
        **values,
        SHARE: share,
        "rope_parameters": {**values.get("rope_parameters", {}), SHARE: share},
        "attention_bias": config.qkv_bias,
        "attention_dropout": 0.0,
        "head_dim": config.head_dim,
    }


def names(config: DecoderConfig) -> Names:
    """Returns where every parameter is on disk."""
    return llama.names(config, mlp=phi3.fused_mlp)
