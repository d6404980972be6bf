"""Phi-3, Phi-3.5 and Phi-4: Llama without biases. On disk, q, k and v are one weight, and so are gate and up.

The models for long texts scale their rotary embedding with LongRoPE; in Phi-4-mini, only a part of each head rotates.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ...config.model import Model
from ..config import DecoderConfig
from ..huggingface.naming import DiskRows, Names
from . import choices, llama, qwen2

FAMILY = "PHI3"
ARCHITECTURE = "Phi3ForCausalLM"
HF_MODEL_TYPE = "phi3"
HEAD = llama.HEAD
PARTIAL_ROTARY = True
FIXED: choices.Allowed = {
    **llama.FIXED, **choices.HF_WINDOWS, "resid_pdrop": (0.0,), "embd_pdrop": (0.0,), "attention_dropout": (0.0,),
    "attention_bias": (False,),
}  # fmt: skip
LONG = ("su", "yarn", "longrope")
"""Names of LongRoPE in ``config.json``."""


def problems(model: Model) -> Iterator[str]:
    """Yields what does not fit this family in a config's ``model`` section."""
    yield from choices.problems(model, FAMILY, choices.SLIDING_WINDOW)
    yield from choices.no_attention_biases(model, FAMILY)


def from_section(model: Model) -> DecoderConfig:
    """Returns the decoder that a config's ``model`` section describes."""
    return replace(llama.from_section(model), family=FAMILY, windows=qwen2.section_windows(model))


def from_hf(hf: dict[str, Any]) -> DecoderConfig:
    """Returns the decoder that a Hugging Face ``config.json`` describes."""
    defaults = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096}
    values = {**defaults, **hf, "attention_bias": False, "mlp_bias": False}
    for key in ("rope_scaling", "rope_parameters"):
        scaling = values.get(key)
        if isinstance(scaling, dict) and {scaling.get("type"), scaling.get("rope_type")} & {*LONG}:
            named = {name: "longrope" for name in ("type", "rope_type") if name in scaling}
            original = values["original_max_position_embeddings"]
            values[key] = {"original_max_position_embeddings": original, **scaling, **named}
    window = hf.get("sliding_window")
    windows = qwen2.windows_from(hf["num_hidden_layers"], window, 0) if window else ()
    return replace(llama.from_hf(values), family=FAMILY, windows=windows)


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Returns the Hugging Face ``config.json`` of a decoder. The family's own code takes no other keys of LongRoPE."""
    values = llama.common_to_hf(config, ARCHITECTURE, HF_MODEL_TYPE)
    rope = config.rope
    original = config.max_position_embeddings
    if rope is not None and rope.kind == "longrope":
        original = rope.options["original_max_position_embeddings"]
        keys = ("short_factor", "long_factor", "attention_factor")
        values["rope_scaling"] = {"type": "longrope", **{key: rope.options[key] for key in keys if key in rope.options}}
    return {
        **values,
        "original_max_position_embeddings": original,
        "sliding_window": config.windows[0] if config.windows else None,
        "head_dim": config.head_dim,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attention_dropout"), 0.0),
    }


def names(config: DecoderConfig) -> Names:
    """Returns where every parameter is on disk."""
    return llama.names(config, _attention, fused_mlp)


def _attention(config: DecoderConfig, layer: int) -> Names:
    """Returns where q, k, v (one after the other) and o of one layer are on disk."""
    ours, disk = f"layers.{layer}.attn", f"model.layers.{layer}.self_attn"
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    found: Names = {f"{ours}.o.weight": [DiskRows(f"{disk}.o_proj.weight")]}
    for name, start, count in (("q", 0, queries), ("k", queries, keys), ("v", queries + keys, keys)):
        found[f"{ours}.{name}.weight"] = [DiskRows(f"{disk}.qkv_proj.weight", start, count)]
    return found


def fused_mlp(config: DecoderConfig, layer: int) -> Names:
    """Returns where gate and up (one after the other) and down of one layer are on disk."""
    ours, disk, width = f"layers.{layer}.mlp", f"model.layers.{layer}.mlp", config.intermediate_size
    return {
        f"{ours}.gate.weight": [DiskRows(f"{disk}.gate_up_proj.weight", 0, width)],
        f"{ours}.up.weight": [DiskRows(f"{disk}.gate_up_proj.weight", width, width)],
        f"{ours}.down.weight": [DiskRows(f"{disk}.down_proj.weight")],
    }
