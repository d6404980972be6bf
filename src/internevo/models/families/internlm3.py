"""InternLM3: Llama with its own head size, few key/value heads, and two switches for biases."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ...config.model import Model
from ..config import DecoderConfig
from . import choices, llama

FAMILY = "INTERNLM3"
ARCHITECTURE = "InternLM3ForCausalLM"
HF_MODEL_TYPE = "internlm3"
HEAD = llama.HEAD
FIXED = llama.FIXED
names = llama.names


def problems(model: Model) -> Iterator[str]:
    """Yields what does not fit this family in a config's ``model`` section."""
    yield from choices.problems(model, FAMILY, choices.MLP_BIAS)
    output_bias = model.no_bias is False if model.o_bias is None else model.o_bias
    if "mlp_bias" in model.model_fields_set and model.mlp_bias != output_bias:
        yield (
            f"model.mlp_bias = {model.mlp_bias}, but in {FAMILY} the MLP has biases if the output projection of attention has "
            f"them, and it is {output_bias} for that (model.o_bias, model.no_bias); set both to the same"
        )


def from_section(model: Model) -> DecoderConfig:
    """Returns the decoder that a config's ``model`` section describes."""
    base = llama.from_section(model)
    return replace(base, family=FAMILY, mlp_bias=base.o_bias)


def from_hf(hf: dict[str, Any]) -> DecoderConfig:
    """Returns the decoder that a Hugging Face ``config.json`` describes.

    ``qkv_bias`` is for q, k and v, and ``bias`` is for o and the MLP. transformers 5 writes them as ``attention_bias`` and
    ``mlp_bias``.
    """
    qkv = hf.get("qkv_bias", hf.get("attention_bias", False))
    rest = hf.get("bias", hf.get("mlp_bias", False))
    defaults = {"num_key_value_heads": 2, "head_dim": 128, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5}
    return replace(llama.from_hf({**defaults, **hf}), family=FAMILY, qkv_bias=qkv, o_bias=rest, mlp_bias=rest)


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Returns the Hugging Face ``config.json`` of a decoder, with the keys of transformers 4, which the family's code reads."""
    values = {
        **llama.common_to_hf(config, ARCHITECTURE, HF_MODEL_TYPE),
        "auto_map": llama.remote_code("internlm3", "InternLM3", model="InternLM3Model"),
        "qkv_bias": config.qkv_bias,
        "bias": config.o_bias,
        "head_dim": config.head_dim,
    }
    values.pop("rope_parameters", None)
    if values.get("rope_scaling"):
        del values["rope_scaling"]["type"]
    return values
