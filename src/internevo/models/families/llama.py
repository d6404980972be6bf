"""Llama 2 and 3: the decoder that all families share, with Hugging Face's names. Other families say how they differ from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ...config.model import Model
from ..config import DecoderConfig, Rope
from ..huggingface.naming import DiskRows, Names
from . import choices
from . import rope as rope_hf

FAMILY = "LLAMA2"
ARCHITECTURE = "LlamaForCausalLM"
HF_MODEL_TYPE = "llama"
HEAD = "lm_head.weight"
FIXED: choices.Allowed = {"hidden_act": ("silu",)}
NORMS = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
"""Name of a layer's norm -> its name on disk."""


def problems(model: Model) -> Iterator[str]:
    """Yields what does not fit this family in a config's ``model`` section."""
    return choices.problems(model, FAMILY, choices.MLP_BIAS)


def from_section(model: Model) -> DecoderConfig:
    """Returns the decoder that a config's ``model`` section describes."""
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
        tie_embeddings=bool(model.tie_word_embeddings),
    )


def from_hf(hf: dict[str, Any]) -> DecoderConfig:
    """Returns the decoder that a Hugging Face ``config.json`` describes. Missing keys have transformers' defaults."""
    heads, bias = hf["num_attention_heads"], hf.get("attention_bias", False)
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
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=hf.get("mlp_bias", False),
        tie_embeddings=hf.get("tie_word_embeddings", False),
    )


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Returns the Hugging Face ``config.json`` of a decoder."""
    return {
        **common_to_hf(config, ARCHITECTURE, HF_MODEL_TYPE),
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
        "head_dim": config.head_dim,
    }


def common_to_hf(config: DecoderConfig, architecture: str, model_type: str) -> dict[str, Any]:
    """Returns the keys of ``config.json`` that all families similar to Llama have."""
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_act": "silu",
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
        **(rope_hf.to_hf(config.rope) if config.rope else {}),
    }


def remote_code(name: str, class_name: str, model: str | None = None) -> dict[str, str]:
    """Returns ``auto_map`` for a family whose folders contain their own code for transformers.

    Args:
        name: the end of the names of the code files.
        class_name: the beginning of the names of the classes.
        model: the class for AutoModel. None: the same as for AutoModelForCausalLM.
    """
    causal = f"modeling_{name}.{class_name}ForCausalLM"
    return {
        "AutoConfig": f"configuration_{name}.{class_name}Config",
        "AutoModel": f"modeling_{name}.{model}" if model else causal,
        "AutoModelForCausalLM": causal,
    }


def names(
    config: DecoderConfig,
    attention: Callable[[DecoderConfig, int], Names] | None = None,
    mlp: Callable[[DecoderConfig, int], Names] | None = None,
    norms: Mapping[str, str] = NORMS,
) -> Names:
    """Returns where every parameter is on disk.

    Args:
        attention, mlp: functions (config, layer) -> where this part of the layer is on disk, if it differs from Llama.
        norms: name of a layer's norm -> its name on disk.
    """
    found: Names = {"embed.weight": [DiskRows("model.embed_tokens.weight")]}
    for n in range(config.num_layers):
        disk, ours = f"model.layers.{n}", f"layers.{n}"
        found |= {f"{ours}.{name}.weight": [DiskRows(f"{disk}.{theirs}.weight")] for name, theirs in norms.items()}
        found |= (attention or attention_names)(config, n)
        found |= (mlp or mlp_names)(config, n)
    found["norm.weight"] = [DiskRows("model.norm.weight")]
    if not config.tie_embeddings:
        found["head.weight"] = [DiskRows(HEAD)]
    return found


def attention_names(config: DecoderConfig, layer: int) -> Names:
    """Returns where q, k, v, o and the norms of queries and keys of one layer are on disk."""
    found: Names = {}
    for name in "qkvo":
        bias = config.o_bias if name == "o" else config.qkv_bias
        for kind in ("weight", "bias") if bias else ("weight",):
            found[f"layers.{layer}.attn.{name}.{kind}"] = [DiskRows(f"model.layers.{layer}.self_attn.{name}_proj.{kind}")]
    if config.qk_norm:
        for name in ("q_norm", "k_norm"):
            found[f"layers.{layer}.attn.{name}.weight"] = [DiskRows(f"model.layers.{layer}.self_attn.{name}.weight")]
    return found


def mlp_names(config: DecoderConfig, layer: int, ours: str = "mlp", disk: str = "mlp") -> Names:
    """Returns where gate, up and down of one layer are on disk.

    Args:
        ours, disk: the names of the MLP in the decoder and on disk.
    """
    return {
        f"layers.{layer}.{ours}.{name}.{kind}": [DiskRows(f"model.layers.{layer}.{disk}.{name}_proj.{kind}")]
        for name in ("gate", "up", "down")
        for kind in (("weight", "bias") if config.mlp_bias else ("weight",))
    }
