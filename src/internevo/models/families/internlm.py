"""InternLM: Llama with biases on q, k, v and o. The numbers of key/value heads and query heads are the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ...config.model import Model
from ...errors import UsageError
from ..config import DecoderConfig, Rope
from . import choices, llama, rope

FAMILY = "INTERNLM"
ARCHITECTURE = "InternLMForCausalLM"
HF_MODEL_TYPE = "internlm"
HEAD = llama.HEAD
FIXED = llama.FIXED
names = llama.names


def problems(model: Model) -> Iterator[str]:
    """Yields what does not fit this family in a config's ``model`` section."""
    return choices.problems(model, FAMILY)


def from_section(model: Model) -> DecoderConfig:
    """Returns the decoder that a config's ``model`` section describes. By default q, k, v and o have biases."""
    bias = model.no_bias is not True
    base = llama.from_section(model)
    return replace(
        base,
        family=FAMILY,
        qkv_bias=bias if model.qkv_bias is None else model.qkv_bias,
        o_bias=bias if model.o_bias is None else model.o_bias,
        mlp_bias=False,
    )


def from_hf(hf: dict[str, Any]) -> DecoderConfig:
    """Returns the decoder that a Hugging Face ``config.json`` describes.

    ``bias`` (default: true) is for attention only. ``rotary`` has the base and the type of the rotary embedding; with type
    "dynamic", the base grows with document length / max_position_embeddings.
    """
    bias, rotary, heads = hf.get("bias", True), hf.get("rotary") or {}, hf["num_attention_heads"]
    kinds = {"origin": "default", "dynamic": "dynamic"}
    if not isinstance(rotary, dict) or rotary.keys() - {"base", "type"} or rotary.get("type", "origin") not in kinds:
        raise UsageError(f"rotary = {rotary!r} must have a base, and a type: origin or dynamic")
    kind, base = kinds[rotary.get("type", "origin")], rope.from_hf({"rope_theta": rotary.get("base")}).base
    plain = llama.from_hf({**hf, "num_key_value_heads": heads, "rope_parameters": None, "rope_scaling": None})
    return replace(plain, family=FAMILY, rope=Rope(base, kind), qkv_bias=bias, o_bias=bias, mlp_bias=False)


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Returns the Hugging Face ``config.json`` of a decoder."""
    embedding = config.rope or Rope()  # InternLM cannot be without one; ``as_family`` notices the difference
    values = llama.common_to_hf(config, ARCHITECTURE, HF_MODEL_TYPE)
    for key in ("num_key_value_heads", "rope_theta", "rope_scaling", "rope_parameters"):
        values.pop(key, None)
    kind = "dynamic" if embedding.kind == "dynamic" else "origin"
    return {
        **values,
        "auto_map": llama.remote_code("internlm", "InternLM"),
        "bias": config.qkv_bias,
        "rotary": {"base": embedding.base, "type": kind},
    }
