"""A decoder as keys of a config: by them it is filled in from a model, compared with another one, and described in messages."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ..config.rope import SHARE
from .config import DecoderConfig

BALANCE_BIAS = "balance bias of the routers (model.moe_layer_kwargs.bias_update_speed)"
"""The name of ``Experts.balance_bias`` in messages."""


def settings(config: DecoderConfig) -> dict[str, Any]:
    """Returns the keys of a config that describe a decoder, with their values. Adapters are not among them."""
    rope, moe, latent = config.rope, config.experts, config.latent
    scaling = None
    if rope and rope.kind != "default":
        scaling = {"rope_type": rope.kind, "factor": rope.factor, **rope.options}
    if rope and rope.share != 1.0:
        scaling = {"rope_type": rope.kind, **(scaling or {}), SHARE: rope.share}
    values: dict[str, Any] = {
        "model_type": config.family,
        "model.num_layers": config.num_layers,
        "model.hidden_size": config.hidden_size,
        "model.vocab_size": config.vocab_size,
        "model.num_attention_heads": config.num_heads,
        "model.num_kv_attention_heads": config.num_kv_heads,
        "model.head_dim": None if latent else config.head_dim,
        "model.q_lora_rank": latent and (latent.query_rank or None),
        "model.kv_lora_rank": latent and latent.rank,
        "model.qk_nope_head_dim": latent and latent.plain_dim,
        "model.qk_rope_head_dim": latent and latent.rotary_dim,
        "model.v_head_dim": latent and latent.value_dim,
        "model.intermediate_size": config.intermediate_size if not moe or moe.dense_layers else None,
        "model.layer_norm_epsilon": config.norm_eps,
        "model.qkv_bias": config.qkv_bias,
        "model.o_bias": config.o_bias,
        "model.mlp_bias": config.mlp_bias,
        "model.tie_word_embeddings": config.tie_embeddings,
        "model.use_alibi": rope is None,
        "model.rope_base": rope and rope.base,
        "model.rope_scaling": scaling,
        "model.no_rope_layers": _no_rope_layers(config),
        "model.max_position_embeddings": config.max_position_embeddings,
        "model.sliding_window": list(config.windows) or None,
        "model.norm_head": config.norm_head,
        "model.add_unit_offset": config.norm_unit_offset,
        "model.use_swiglu": config.activation == "silu",
        "rope.interleaved (a fact of model_type)": rope is not None and rope.interleaved,
        "qk_norm (a fact of model_type)": config.qk_norm,
        "out_norms (a fact of model_type)": config.out_norms,
        "window_rope (a fact of model_type)": config.window_rope and asdict(config.window_rope),
        "model.query_pre_attn_scalar": None if config.query_scale == 1.0 else config.query_scalar,
        "model.embedding_multiplier": config.embedding_multiplier,
        "model.attention_multiplier": config.attention_multiplier,
        "model.residual_multiplier": config.residual_multiplier,
        "model.logits_scaling": config.logits_scaling,
        "model.attn_logit_softcapping": config.attention_softcap,
        "model.final_logit_softcapping": config.logit_softcap,
        "scale_embedding (a fact of model_type)": config.scale_embedding,
        "model.num_experts": moe.count if moe else 1,
    }
    if moe:
        values |= {
            "model.top_k": moe.top_k,
            "model.moe_intermediate_size": moe.size,
            "model.norm_topk_prob": moe.normalize,
            "model.shared_expert_intermediate_size": moe.shared_size,
            "model.mlp_only_layers": list(moe.dense_layers),
            "model.moe_layer_kwargs.capacity_factor": moe.capacity_factor,
            "model.moe_layer_kwargs.eval_capacity_factor": moe.eval_capacity_factor,
            "model.moe_layer_kwargs.min_capacity": moe.min_capacity,
            "model.moe_layer_kwargs.drop_policy": moe.drop_policy,
            BALANCE_BIAS: moe.balance_bias,
            "model.n_group": moe.groups,
            "model.topk_group": moe.top_groups,
            "model.routed_scaling_factor": moe.scale,
            "scoring of experts (a fact of model_type)": moe.scoring,
            "shared_gate (a fact of model_type)": moe.shared_gate,
        }
    return values


def _no_rope_layers(config: DecoderConfig) -> list[int] | None:
    """Returns 1 for each layer with a rotary embedding and 0 for each one without. None: all have one."""
    without = config.layers_without_rope
    return [int(layer not in without) for layer in range(config.num_layers)] if without else None
