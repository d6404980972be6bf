"""Baichuan2: Llama with a normalised head. On disk, q, k and v are one weight. 7B uses the rotary embedding, 13B ALiBi.

In Hugging Face configs, both sizes have the same architecture and model_type. A model whose config has
``max_position_embeddings`` uses the rotary embedding; one whose config has only ``model_max_length`` uses ALiBi.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ...config.model import Model
from ..config import DecoderConfig
from ..huggingface.naming import DiskRows, Names
from . import choices, llama

FAMILY = "BAICHUAN2"
ARCHITECTURE = "BaichuanForCausalLM"
HF_MODEL_TYPE = "baichuan"
HEAD = llama.HEAD
FIXED = llama.FIXED


def problems(model: Model) -> Iterator[str]:
    """Yields what does not fit this family in a config's ``model`` section."""
    allowed = {**choices.MLP_BIAS, "norm_head": choices.ANY_VALUE, "use_alibi": choices.ANY_VALUE}
    return choices.problems(model, FAMILY, allowed)


def from_section(model: Model) -> DecoderConfig:
    """Returns the decoder that a config's ``model`` section describes."""
    base = llama.from_section(model)
    return replace(base, family=FAMILY, norm_head=model.norm_head is not False, rope=None if model.use_alibi else base.rope)


def from_hf(hf: dict[str, Any]) -> DecoderConfig:
    """Returns the decoder that a Hugging Face ``config.json`` describes."""
    alibi = "max_position_embeddings" not in hf
    longest = hf.get("max_position_embeddings") or hf.get("model_max_length") or 4096
    plain = llama.from_hf({**hf, "max_position_embeddings": longest, "num_key_value_heads": None})
    return replace(
        plain, family=FAMILY, norm_head=True, rope=None if alibi else plain.rope, qkv_bias=False, o_bias=False, mlp_bias=False
    )


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Returns the Hugging Face ``config.json`` of a decoder."""
    values = llama.common_to_hf(config, ARCHITECTURE, HF_MODEL_TYPE)
    for key in ("num_key_value_heads", "rope_theta", "rope_scaling", "rope_parameters"):
        values.pop(key, None)
    values["model_max_length"] = config.max_position_embeddings
    if config.rope is None:
        del values["max_position_embeddings"]
    return {**values, "auto_map": llama.remote_code("baichuan", "Baichuan")}


def names(config: DecoderConfig) -> Names:
    """Returns where every parameter is on disk."""
    return llama.names(config, attention=_packed)


def _packed(config: DecoderConfig, layer: int) -> Names:
    """Returns where q, k, v and o are on disk. The rows of W_pack are all of q, then all of k, then all of v."""
    disk, ours, rows = f"model.layers.{layer}.self_attn", f"layers.{layer}.attn", config.num_heads * config.head_dim
    found = {f"{ours}.{part}.weight": [DiskRows(f"{disk}.W_pack.weight", n * rows, rows)] for n, part in enumerate("qkv")}
    return {**found, f"{ours}.o.weight": [DiskRows(f"{disk}.o_proj.weight")]}
