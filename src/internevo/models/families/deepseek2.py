"""DeepSeek-V2: latent attention, dense first layers, and then many small experts next to a shared one, which each token chooses
in a few groups (https://arxiv.org/abs/2405.04434)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ...config.model import Model
from ...errors import UsageError
from ..config import DecoderConfig, Experts, Latent, Rope
from ..huggingface.naming import DiskRows, Names
from . import choices, experts, llama

FAMILY = "DEEPSEEKV2"
ARCHITECTURE = "DeepseekV2ForCausalLM"
HF_MODEL_TYPE = "deepseek_v2"
HEAD = llama.HEAD
ALIKE: choices.Allowed = {
    **llama.FIXED, "moe_layer_freq": (1, None), "pretraining_tp": (1, None), "attention_dropout": (0.0, None),
    "mlp_bias": (False, None),
}  # fmt: skip
FIXED: choices.Allowed = {
    **ALIKE, "rope_interleave": (True, None), "scoring_func": ("softmax", None), "norm_topk_prob": (False, None),
    "topk_method": ("greedy", "group_limited_greedy", None),
}  # fmt: skip
LATENT = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
PROJECTIONS = {"q_a": "q_a_proj", "q": "q_b_proj", "kv_a": "kv_a_proj_with_mqa", "kv": "kv_b_proj", "o": "o_proj"}


def problems(model: Model) -> Iterator[str]:
    """Yields what does not fit this family in a config's ``model`` section."""
    yield from common_problems(model, FAMILY)
    if model.norm_topk_prob:
        yield f"model.norm_topk_prob = True is not supported by model_type = {FAMILY!r}; leave it out"


def common_problems(model: Model, family: str) -> Iterator[str]:
    """Yields what does not fit DeepSeek-V2 and V3."""
    keys = ("q_lora_rank", *LATENT, "n_group", "topk_group", "routed_scaling_factor")
    yield from experts.problems(model, family, shared=True, more=dict.fromkeys(keys, choices.ANY_VALUE))
    if missing := [key for key in LATENT if getattr(model, key) is None]:
        yield f"model_type = {family!r} needs {', '.join(f'model.{key}' for key in missing)}"
        return
    if model.head_dim is not None:
        yield f"model.head_dim is not supported by model_type = {family!r}: it is the sum of its parts; leave it out"
    if model.num_kv_attention_heads not in (None, model.num_attention_heads):
        yield f"model.num_kv_attention_heads is not supported by model_type = {family!r}: every head has its keys; leave it out"
    if (model.qk_rope_head_dim or 0) % 2:
        yield f"model.qk_rope_head_dim = {model.qk_rope_head_dim} must be even for the rotary embedding"
    keys_size = (model.qk_nope_head_dim or 0) + (model.qk_rope_head_dim or 0)
    if (model.v_head_dim or 0) > keys_size:
        yield f"model.v_head_dim = {model.v_head_dim} is greater than qk_nope_head_dim + qk_rope_head_dim = {keys_size}"
    if model.lora is not None and set(model.lora.targets) & {"k", "v"}:
        yield f"model.lora.targets: model_type = {family!r} has no linears k and v; choose from q, o"
    yield from _groups(model)


def _groups(model: Model) -> Iterator[str]:
    """Yields groups of experts that do not fit."""
    count, groups, chosen = model.num_experts, model.n_group, model.topk_group
    if count % groups:
        yield f"model.num_experts = {count} is not a multiple of model.n_group = {groups}"
    elif chosen > groups:
        yield f"model.topk_group = {chosen} is greater than model.n_group = {groups}"
    elif model.top_k > count // groups * chosen:
        most = count // groups * chosen
        yield f"model.top_k = {model.top_k} is greater than {most}, the experts of model.topk_group = {chosen} groups"


def from_section(model: Model) -> DecoderConfig:
    """Returns the decoder that a config's ``model`` section describes."""
    return section(model, FAMILY, Experts(0, 0, 0, normalize=False))


def section(model: Model, family: str, router: Experts) -> DecoderConfig:
    """Returns the decoder of DeepSeek-V2 or V3.

    Args:
        router: has how the family's routers choose.
    """
    size = model.moe_intermediate_size or model.mlp_width
    shared = model.shared_expert_intermediate_size or model.num_shared_experts * size
    latent = Latent(
        model.kv_lora_rank or 0, model.q_lora_rank or 0, model.qk_nope_head_dim or 0, model.qk_rope_head_dim or 0,
        model.v_head_dim or 0,
    )  # fmt: skip
    found = experts.from_section(model, shared, normalize=router.normalize)
    moe = replace(
        found,
        shared_gate=False,
        scoring=router.scoring,
        groups=model.n_group,
        top_groups=model.topk_group if model.n_group > 1 else 1,
        scale=model.routed_scaling_factor,
        balance_bias=found.balance_bias or router.balance_bias,
    )
    plain = llama.from_section(model)
    return _with_latent(replace(plain, family=family, experts=moe, mlp_bias=False), latent)


def _with_latent(plain: DecoderConfig, latent: Latent) -> DecoderConfig:
    rope = replace(plain.rope or Rope(), interleaved=True)
    return replace(
        plain, latent=latent, rope=rope, head_dim=latent.plain_dim + latent.rotary_dim, num_kv_heads=plain.num_heads
    )  # fmt: skip


def from_hf(hf: dict[str, Any]) -> DecoderConfig:
    """Returns the decoder that a Hugging Face ``config.json`` describes. ``attention_bias`` is for the latents and o."""
    defaults = {
        "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "n_routed_experts": 64, "n_shared_experts": 2, "moe_intermediate_size": 1407, "routed_scaling_factor": 1.0,
        "first_k_dense_replace": 0, "topk_method": "greedy", "max_position_embeddings": 2048,
    }  # fmt: skip
    values = {**defaults, **hf}
    grouped = values["topk_method"] == "group_limited_greedy"
    return hf_decoder(values, FAMILY, Experts(0, 0, 0, normalize=False, groups=values["n_group"] if grouped else 1))


def hf_decoder(values: dict[str, Any], family: str, router: Experts) -> DecoderConfig:
    """Returns the decoder of a ``config.json`` of DeepSeek-V2 or V3.

    Args:
        router: has how the family's routers choose, and how many groups there are.
    """
    size = values["moe_intermediate_size"]
    moe = replace(
        router,
        count=values["n_routed_experts"],
        top_k=values["num_experts_per_tok"],
        size=size,
        shared_size=(values["n_shared_experts"] or 0) * size,
        shared_gate=False,
        dense_layers=tuple(range(min(values["first_k_dense_replace"] or 0, values["num_hidden_layers"]))),
        top_groups=values["topk_group"] if router.groups > 1 else 1,
        scale=float(values["routed_scaling_factor"]),
    )
    latent = Latent(
        values["kv_lora_rank"], values["q_lora_rank"] or 0, values["qk_nope_head_dim"], values["qk_rope_head_dim"],
        values["v_head_dim"],
    )  # fmt: skip
    plain = llama.from_hf({**values, "head_dim": latent.plain_dim + latent.rotary_dim, "mlp_bias": False})
    return _with_latent(replace(plain, family=family, experts=moe), latent)


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Returns the Hugging Face ``config.json`` of a decoder."""
    grouped = config.experts is not None and config.experts.groups > 1
    return {
        **common_to_hf(config, ARCHITECTURE, HF_MODEL_TYPE),
        "topk_method": "group_limited_greedy" if grouped else "greedy",
        "scoring_func": "softmax",
    }


def common_to_hf(config: DecoderConfig, architecture: str, model_type: str) -> dict[str, Any]:
    """Returns the ``config.json`` of DeepSeek-V2 or V3, without what only one of them has."""
    moe, latent = experts.require(config, architecture), latent_of(config, architecture)
    return {
        **llama.common_to_hf(config, architecture, model_type),
        "attention_bias": config.qkv_bias,
        "attention_dropout": 0.0,
        "head_dim": latent.rotary_dim,
        "q_lora_rank": latent.query_rank or None,
        "kv_lora_rank": latent.rank,
        "qk_nope_head_dim": latent.plain_dim,
        "qk_rope_head_dim": latent.rotary_dim,
        "v_head_dim": latent.value_dim,
        "n_routed_experts": moe.count,
        "n_shared_experts": moe.shared_size // moe.size,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.size,
        "moe_layer_freq": 1,
        "first_k_dense_replace": len(moe.dense_layers),
        "norm_topk_prob": moe.normalize,
        "n_group": moe.groups,
        "topk_group": moe.top_groups,
        "routed_scaling_factor": moe.scale,
    }


def latent_of(config: DecoderConfig, architecture: str) -> Latent:
    """Returns the latent attention of a model that will be written as ``architecture``.

    Raises:
        UsageError: if the model has none.
    """
    if config.latent is None:
        raise UsageError(f"a Hugging Face folder of {architecture} cannot describe this model: it has no latent attention")
    return config.latent


def names(config: DecoderConfig) -> Names:
    """Returns where every parameter is on disk."""
    return llama.names(config, attention=_attention, mlp=_sparse)


def _attention(config: DecoderConfig, layer: int) -> Names:
    disk, ours, found = f"model.layers.{layer}.self_attn", f"layers.{layer}.attn", dict[str, list[DiskRows]]()
    for name, linear in config.projections().items():
        theirs = "q_proj" if name == "q" and not (config.latent and config.latent.query_rank) else PROJECTIONS[name]
        biased = config.o_bias if name == "o" else config.qkv_bias and linear.heads is None
        for kind in ("weight", "bias") if biased else ("weight",):
            found[f"{ours}.{name}.{kind}"] = [DiskRows(f"{disk}.{theirs}.{kind}")]
        if linear.heads is None:
            found[f"{ours}.{name}_norm.weight"] = [DiskRows(f"{disk}.{name}_layernorm.weight")]
    return found


def _sparse(config: DecoderConfig, layer: int) -> Names:
    if config.experts is None or not config.is_sparse(layer):
        return llama.mlp_names(config, layer)
    disk = f"model.layers.{layer}.mlp"
    parts = {name: f"{name}_proj.weight" for name in ("gate", "up", "down")}
    found = experts.names(config, layer, f"{disk}.gate.weight", f"{disk}.experts.{{}}", parts)
    if config.experts.shared_size:
        found |= llama.mlp_names(config, layer, "mlp.shared", "mlp.shared_experts")
    return found
