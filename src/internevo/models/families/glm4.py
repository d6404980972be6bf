"""GLM-4-0414: GLM-4 with a norm after attention and another one after the MLP."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ...config.model import Model
from ..config import DecoderConfig
from ..huggingface.naming import Names
from . import choices, glm, llama, phi3

FAMILY = "GLM4"
ARCHITECTURE = "Glm4ForCausalLM"
HF_MODEL_TYPE = "glm4"
HEAD = llama.HEAD
PARTIAL_ROTARY = True
FIXED = glm.FIXED
NORMS = {**llama.NORMS, "attn_out_norm": "post_self_attn_layernorm", "mlp_out_norm": "post_mlp_layernorm"}


def problems(model: Model) -> Iterator[str]:
    """Yields what does not fit this family in a config's ``model`` section."""
    yield from choices.problems(model, FAMILY)
    yield from glm.biases(model, FAMILY)


def from_section(model: Model) -> DecoderConfig:
    """Returns the decoder that a config's ``model`` section describes."""
    return replace(glm.from_section(model), family=FAMILY, out_norms=True)


def from_hf(hf: dict[str, Any]) -> DecoderConfig:
    """Returns the decoder that a Hugging Face ``config.json`` describes."""
    return replace(glm.from_hf(hf), family=FAMILY, out_norms=True)


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Returns the Hugging Face ``config.json`` of a decoder."""
    return {**glm.to_hf(config), "architectures": [ARCHITECTURE], "model_type": HF_MODEL_TYPE}


def names(config: DecoderConfig) -> Names:
    """Returns where every parameter is on disk."""
    return llama.names(config, mlp=phi3.fused_mlp, norms=NORMS)
