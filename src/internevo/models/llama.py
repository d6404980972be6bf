"""Llama 2 and 3: the shared decoder under Hugging Face's names."""

from __future__ import annotations

from typing import Any

from ..config.model import Model
from . import rope_hf
from .config import DecoderConfig, Rope
from .hf import Entry

FAMILY = "LLAMA2"
ARCHITECTURE = "LlamaForCausalLM"
HF_MODEL_TYPES = ("llama",)


def from_section(model: Model) -> DecoderConfig:
    """The decoder that a config's ``model`` section describes."""
    bias = model.no_bias is False
    scaling = model.rope_scaling
    if model.use_dynamic_ntk_rope or model.rope_type == "dynamic_ntk":
        scaling = {"rope_type": "dynamic", "factor": model.rope_scaling_factor}
    return DecoderConfig(
        family=FAMILY,
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.mlp_width,
        num_layers=model.num_layers,
        num_heads=model.num_attention_heads,
        num_kv_heads=model.num_kv_attention_heads or model.num_attention_heads,
        head_dim=model.head_dim or model.hidden_size // model.num_attention_heads,
        norm_eps=model.layer_norm_epsilon,
        rope=rope_hf.from_scaling(scaling, model.rope_base) if scaling else Rope(model.rope_base),
        max_position_embeddings=model.max_position_embeddings,
        qkv_bias=bias if model.qkv_bias is None else model.qkv_bias,
        o_bias=bias if model.o_bias is None else model.o_bias,
        mlp_bias=model.mlp_bias,
        tie_embeddings=model.tie_word_embeddings,
    )


def from_hf(hf: dict[str, Any]) -> DecoderConfig:
    """The decoder that a Hugging Face ``config.json`` describes; missing keys mean transformers' defaults."""
    heads = hf["num_attention_heads"]
    return DecoderConfig(
        family=FAMILY,
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        intermediate_size=hf["intermediate_size"],
        num_layers=hf["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=hf.get("num_key_value_heads") or heads,
        head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        rope=rope_hf.from_hf(hf),
        max_position_embeddings=hf.get("max_position_embeddings", 2048),
        qkv_bias=hf.get("attention_bias", False),
        o_bias=hf.get("attention_bias", False),
        mlp_bias=hf.get("mlp_bias", False),
        tie_embeddings=hf.get("tie_word_embeddings", False),
    )


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The Hugging Face ``config.json`` of a decoder."""
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
        "head_dim": config.head_dim,
        **common_to_hf(config),
    }


def common_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The keys that families of the Llama line share."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": 0.02,
        "use_cache": True,
        **rope_hf.to_hf(config.rope),
    }


def entries(config: DecoderConfig) -> list[Entry]:
    """Every tensor on disk."""
    found = [Entry("model.embed_tokens.weight", ("embed.weight",))]
    for n in range(config.num_layers):
        disk, ours = f"model.layers.{n}", f"layers.{n}"
        linears = [("self_attn", "attn", name, config.qkv_bias) for name in "qkv"]
        linears += [("self_attn", "attn", "o", config.o_bias)]
        linears += [("mlp", "mlp", name, config.mlp_bias) for name in ("gate", "up", "down")]
        for theirs, block, name, bias in linears:
            for kind in ("weight", "bias") if bias else ("weight",):
                found.append(Entry(f"{disk}.{theirs}.{name}_proj.{kind}", (f"{ours}.{block}.{name}.{kind}",)))
        found.append(Entry(f"{disk}.input_layernorm.weight", (f"{ours}.attn_norm.weight",)))
        found.append(Entry(f"{disk}.post_attention_layernorm.weight", (f"{ours}.mlp_norm.weight",)))
    found.append(Entry("model.norm.weight", ("norm.weight",)))
    if not config.tie_embeddings:
        found.append(Entry("lm_head.weight", ("head.weight",)))
    return found
