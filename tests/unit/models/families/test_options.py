"""No option of a config's ``model`` section is dropped: a family uses it, or refuses it by name."""

from dataclasses import replace
from typing import Any

import pytest

from internevo.config.model import Model
from internevo.models.families import registry
from internevo.models.families.registry import FAMILIES

SHAPE: dict[str, Any] = {"num_layers": 4, "hidden_size": 64, "vocab_size": 100, "num_attention_heads": 4}
EXPERTS = {"num_experts": 4, "top_k": 2}
LATENT = {
    "kv_lora_rank": 16, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10, "n_group": 2, "num_shared_experts": 1,
}  # fmt: skip
BASE = dict.fromkeys(FAMILIES, SHAPE) | {
    "MIXTRALMOE": SHAPE | EXPERTS, "QWEN3MOE": SHAPE | EXPERTS, "QWEN2MOE": SHAPE | EXPERTS | {"num_shared_experts": 1},
    "DEEPSEEKV2": SHAPE | EXPERTS | LATENT, "DEEPSEEKV3": SHAPE | EXPERTS | LATENT,
}  # fmt: skip
"""The smallest section of each family."""
CHANGES: list[dict[str, Any]] = [
    {"num_layers": 5}, {"hidden_size": 128}, {"vocab_size": 101}, {"num_attention_heads": 2}, {"num_kv_attention_heads": 2},
    {"head_dim": 8}, {"mlp_ratio": 8.0}, {"multiple_of": 512}, {"intermediate_size": 77}, {"layer_norm_epsilon": 1e-3},
    {"no_bias": True}, {"no_bias": False}, {"qkv_bias": True}, {"qkv_bias": False}, {"o_bias": True}, {"o_bias": False},
    {"mlp_bias": True}, {"tie_word_embeddings": True}, {"tie_word_embeddings": False}, {"rope_base": 5.0},
    {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, {"use_dynamic_ntk_rope": True}, {"rope_scaling_factor": 3.0},
    {"rope_type": "dynamic_ntk"}, {"max_position_embeddings": 77}, {"sliding_window": 7}, {"max_window_layers": 2},
    {"use_sliding_window": True, "sliding_window": 7}, {"use_alibi": True}, {"no_rope_layers": (1, 0, 1, 1)},
    {"no_rope_layer_interval": 2}, {"norm_head": True}, {"norm_head": False},
    {"add_unit_offset": True}, {"add_unit_offset": False}, {"use_swiglu": True}, {"use_swiglu": False}, {"num_experts": 8},
    {"top_k": 3}, {"moe_type": "Dropless"}, {"moe_layer_kwargs": {"capacity_factor": 2.0}}, {"moe_intermediate_size": 33},
    {"num_shared_experts": 3}, {"shared_expert_intermediate_size": 12}, {"norm_topk_prob": True}, {"norm_topk_prob": False},
    {"decoder_sparse_step": 2}, {"mlp_only_layers": (1,)}, {"embedding_multiplier": 2.0},
    {"attention_multiplier": 0.3}, {"residual_multiplier": 0.3}, {"logits_scaling": 2.0}, {"query_pre_attn_scalar": 7},
    {"attn_logit_softcapping": 7.0},
    {"final_logit_softcapping": 7.0}, {"q_lora_rank": 8}, {"kv_lora_rank": 8}, {"qk_nope_head_dim": 8},
    {"qk_rope_head_dim": 6}, {"v_head_dim": 8}, {"n_group": 4, "topk_group": 2}, {"topk_group": 2},
    {"routed_scaling_factor": 2.0},
]  # fmt: skip
SAYS: dict[str, Any] = {
    "no_bias": lambda d: not (d.qkv_bias or d.o_bias), "qkv_bias": lambda d: d.qkv_bias, "o_bias": lambda d: d.o_bias,
    "tie_word_embeddings": lambda d: d.tie_embeddings, "norm_head": lambda d: d.norm_head,
    "add_unit_offset": lambda d: d.norm_unit_offset, "use_swiglu": lambda d: d.activation == "silu",
    "norm_topk_prob": lambda d: d.experts.normalize,
}  # fmt: skip
"""Switches of which one value is the family's own: what the decoder then says."""


@pytest.mark.parametrize("change", CHANGES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_option_is_used_or_refused(family: str, change: dict[str, Any]) -> None:
    key = next(iter(change))
    plain = registry.decoder_config(family, Model(**BASE[family]))
    assert not list(registry.problems(family, Model(**BASE[family])))
    section = Model(**{**BASE[family], **change})
    if found := list(registry.problems(family, section)):
        assert any(f"model.{key}" in line for line in found), found
        return
    decoder = registry.decoder_config(family, section)
    assert SAYS[key](decoder) == change[key] if key in SAYS else decoder != plain


@pytest.mark.parametrize("family", ["MIXTRALMOE", "QWEN2MOE", "QWEN3MOE"])
@pytest.mark.parametrize("key", ["capacity_factor", "eval_capacity_factor"])
@pytest.mark.parametrize(
    "kind", [{"moe_type": "Dropless"}, {"moe_type": "MegaBlock"}, {"moe_layer_kwargs": {"drop_tokens": False}}], ids=str
)
def test_where_no_token_is_dropped_a_capacity_is_refused(family: str, key: str, kind: dict[str, Any]) -> None:
    section = {**BASE[family], **kind}
    experts = registry.decoder_config(family, Model(**section)).experts
    assert experts is not None and experts == experts.dropless()
    section["moe_layer_kwargs"] = {**section.get("moe_layer_kwargs", {}), key: 1.5}
    assert any(f"model.moe_layer_kwargs.{key} = 1.5, but" in line for line in registry.problems(family, Model(**section)))
    experts = registry.decoder_config(family, Model(**section)).experts
    assert experts is not None and experts == replace(experts.dropless())


def test_layers_without_experts_must_exist() -> None:
    section = Model(**BASE["QWEN3MOE"], mlp_only_layers=(1, 4))
    assert list(registry.problems("QWEN3MOE", section)) == ["model.mlp_only_layers has 4, but the layers are 0 to 3"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"no_rope_layers": (1, 0)}, "model.no_rope_layers has 2 numbers, and model.num_layers = 4"),
        ({"no_rope_layers": (1, 0, 1, 0), "no_rope_layer_interval": 2}, "both say which layers rotate; leave one out"),
        ({"use_sliding_window": True, "sliding_window": 7}, "layers without a rotary embedding get the window"),
        ({"max_window_layers": 2}, "model.max_window_layers is not supported by model_type = 'SMOLLM3'"),
    ],
)  # fmt: skip
def test_layers_without_a_rotary_embedding_fit_the_model(options: dict[str, Any], message: str) -> None:
    assert any(message in line for line in registry.problems("SMOLLM3", Model(**SHAPE, **options)))


def test_internlm3_has_one_switch_for_o_and_the_mlp() -> None:
    for no_bias, mlp_bias in ((True, True), (False, False)):
        section = Model(**SHAPE, no_bias=no_bias, mlp_bias=mlp_bias)
        assert any("set both to the same" in line for line in registry.problems("INTERNLM3", section))
    assert registry.decoder_config("INTERNLM3", Model(**SHAPE, no_bias=False, mlp_bias=True)).mlp_bias


def test_a_window_that_is_switched_off_may_stand_in_a_config() -> None:
    """Qwen2's published configs have all three keys."""
    section = Model(**SHAPE, use_sliding_window=False, sliding_window=4096, max_window_layers=28)
    assert not list(registry.problems("QWEN2", section)) and registry.decoder_config("QWEN2", section).windows == ()
