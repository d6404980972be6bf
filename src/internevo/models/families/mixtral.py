"""Mixtral: Llama with experts in every layer. The weights of the experts that a token chooses add up to 1."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ...config.model import Model
from ..config import DecoderConfig, Experts
from ..huggingface.naming import Names
from . import choices, experts, llama, qwen2, rope

FAMILY = "MIXTRALMOE"
ARCHITECTURE = "MixtralForCausalLM"
HF_MODEL_TYPE = "mixtral"
HEAD = llama.HEAD
FIXED: choices.Allowed = {**llama.FIXED, **choices.HF_WINDOWS, "router_jitter_noise": (0.0, None)}


def problems(model: Model) -> Iterator[str]:
    """Yields what does not fit this family in a config's ``model`` section."""
    yield from experts.problems(model, FAMILY)
    if model.decoder_sparse_step > 1 or model.mlp_only_layers:
        yield f"{FAMILY} has experts in every layer: leave out model.decoder_sparse_step and model.mlp_only_layers"
    if model.qkv_bias:
        yield f"model.qkv_bias = {model.qkv_bias!r} is not supported by model_type = {FAMILY!r}; leave it out"


def from_section(model: Model) -> DecoderConfig:
    """Returns the decoder that a config's ``model`` section describes."""
    base = llama.from_section(model)
    return replace(base, family=FAMILY, windows=qwen2.section_windows(model), experts=experts.from_section(model))


def from_hf(hf: dict[str, Any]) -> DecoderConfig:
    """Returns the decoder that a Hugging Face ``config.json`` describes. A ``sliding_window`` applies to every layer."""
    defaults = {"rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "num_key_value_heads": 8}
    window = hf.get("sliding_window")
    moe = Experts(hf.get("num_local_experts", 8), hf.get("num_experts_per_tok", 2), hf["intermediate_size"])
    return replace(
        llama.from_hf({**defaults, **hf, "attention_bias": False, "mlp_bias": False}),
        family=FAMILY,
        rope=rope.from_hf(hf, default_base=1e6),
        windows=qwen2.windows_from(hf["num_hidden_layers"], window, 0) if window else (),
        experts=moe,
    )


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Returns the Hugging Face ``config.json`` of a decoder."""
    moe = experts.require(config, ARCHITECTURE)
    return {
        **llama.common_to_hf(config, ARCHITECTURE, HF_MODEL_TYPE),
        "head_dim": config.head_dim,
        "intermediate_size": moe.size,
        "num_local_experts": moe.count,
        "num_experts_per_tok": moe.top_k,
        "sliding_window": config.windows[0] if config.windows else None,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.02,
    }


def names(config: DecoderConfig) -> Names:
    """Returns where every parameter is on disk."""
    return llama.names(config, mlp=_sparse)


def _sparse(config: DecoderConfig, layer: int) -> Names:
    disk = f"model.layers.{layer}.block_sparse_moe"
    parts = {"gate": "w1.weight", "up": "w3.weight", "down": "w2.weight"}
    return experts.names(config, layer, f"{disk}.gate.weight", f"{disk}.experts.{{}}", parts)
