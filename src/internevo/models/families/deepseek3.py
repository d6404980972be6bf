"""DeepSeek-V3: DeepSeek-V2 whose routers have sigmoid scores and a balance bias (https://arxiv.org/abs/2412.19437). The layers
that predict more tokens at once (multi-token prediction) are left out."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ...config.model import Model
from ..config import DecoderConfig, Experts, Rope
from ..huggingface.naming import DiskRows, Names
from . import choices, deepseek2, llama

FAMILY = "DEEPSEEKV3"
ARCHITECTURE = "DeepseekV3ForCausalLM"
HF_MODEL_TYPE = "deepseek_v3"
HEAD = llama.HEAD
BALANCE_BIAS = True
FIXED: choices.Allowed = {
    **deepseek2.ALIKE, "rope_interleave": choices.ANY_VALUE, "scoring_func": ("sigmoid", None),
    "topk_method": ("noaux_tc", None),
}  # fmt: skip
ROUTER = Experts(0, 0, 0, scoring="sigmoid", balance_bias=True)


def problems(model: Model) -> Iterator[str]:
    """Yields what does not fit this family in a config's ``model`` section."""
    yield from deepseek2.common_problems(model, FAMILY)
    if model.n_group > 1 and model.num_experts // model.n_group < 2:
        yield f"model.n_group = {model.n_group}: each group needs at least 2 of the {model.num_experts} experts"


def from_section(model: Model) -> DecoderConfig:
    """Returns the decoder that a config's ``model`` section describes. Its routers always have a balance bias, which stays as
    it is without ``moe_layer_kwargs.bias_update_speed``."""
    return deepseek2.section(model, FAMILY, ROUTER)


def from_hf(hf: dict[str, Any]) -> DecoderConfig:
    """Returns the decoder that a Hugging Face ``config.json`` describes."""
    defaults = {
        "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "moe_intermediate_size": 2048,
        "routed_scaling_factor": 2.5, "first_k_dense_replace": 3, "norm_topk_prob": True, "n_group": 8, "topk_group": 4,
        "max_position_embeddings": 4096, "rope_interleave": True,
    }  # fmt: skip
    values = {**defaults, **hf}
    router = replace(ROUTER, groups=values["n_group"] or 1, normalize=values["norm_topk_prob"])
    found = deepseek2.hf_decoder(values, FAMILY, router)
    return replace(found, rope=replace(found.rope or Rope(), interleaved=values["rope_interleave"] is not False))


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Returns the Hugging Face ``config.json`` of a decoder."""
    return {
        **deepseek2.common_to_hf(config, ARCHITECTURE, HF_MODEL_TYPE),
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "rope_interleave": config.rope is not None and config.rope.interleaved,
        "num_nextn_predict_layers": 0,
    }


def ignored(hf: dict[str, Any], tensor: str) -> bool:
    """Whether a tensor on disk belongs to the layers of multi-token prediction, which follow the others."""
    found = re.match(r"model\.layers\.(\d+)\.", tensor)
    return found is not None and 0 <= int(found[1]) - hf["num_hidden_layers"] < (hf.get("num_nextn_predict_layers") or 0)


def names(config: DecoderConfig) -> Names:
    """Returns where every parameter and every balance bias is on disk."""
    found = deepseek2.names(config)
    for layer in range(config.num_layers):
        if config.is_sparse(layer):
            found[f"layers.{layer}.mlp.router.bias"] = [DiskRows(f"model.layers.{layer}.mlp.gate.e_score_correction_bias")]
    return found
