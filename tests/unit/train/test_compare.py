"""Weights are loaded only into the model that they were trained as; all differences are named at once, by the config's keys."""

import json
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from internevo.config import validate
from internevo.config.run import MAY_DIFFER, Ckpt, LoadCkptInfo
from internevo.errors import ConfigError
from internevo.models.config import DecoderConfig, Experts, Latent, Rope
from internevo.models.settings import BALANCE_BIAS
from internevo.train.compare import compare_models
from internevo.train.restore import _changes, restore
from tests.conftest import Run, WriteConfig, tiny

DENSE = DecoderConfig("LLAMA2", 300, 32, 48, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=8)
MOE = replace(DENSE, family="MIXTRALMOE", experts=Experts(4, 2, 48))
DYNAMIC = replace(DENSE, rope=Rope(kind="dynamic", factor=2.0))
PLACE = Path("there")
CHANGES: list[tuple[DecoderConfig, dict[str, Any], str, bool]] = [
    (DENSE, {"family": "QWEN2"}, "model_type", True),
    (DENSE, {"num_layers": 2}, "model.num_layers", False),
    (DENSE, {"num_heads": 8, "head_dim": 4}, "model.num_attention_heads", False),
    (DENSE, {"num_heads": 8, "head_dim": 4}, "model.head_dim", False),
    (DENSE, {"num_kv_heads": 1}, "model.num_kv_attention_heads", False),
    (DENSE, {"hidden_size": 64}, "model.hidden_size", False),
    (DENSE, {"intermediate_size": 64}, "model.intermediate_size", False),
    (DENSE, {"vocab_size": 301}, "model.vocab_size", False),
    (DENSE, {"tie_embeddings": True}, "model.tie_word_embeddings", False),
    (DENSE, {"qkv_bias": True}, "model.qkv_bias", False),
    (DENSE, {"o_bias": True}, "model.o_bias", False),
    (DENSE, {"mlp_bias": True}, "model.mlp_bias", False),
    (DENSE, {"norm_eps": 1e-6}, "model.layer_norm_epsilon", True),
    (DENSE, {"rope": Rope(5.0)}, "model.rope_base", True),
    (DENSE, {"rope": Rope(10000.0, "linear", 2.0)}, "model.rope_scaling", True),
    (DENSE, {"rope": None}, "model.use_alibi", True),
    (DENSE, {"windows": (0, 0, 7, 7)}, "model.sliding_window", True),
    (DENSE, {"layers_without_rope": (1,)}, "model.no_rope_layers", False),
    (DENSE, {"activation": "gelu_tanh"}, "model.use_swiglu", True),
    (DENSE, {"norm_unit_offset": True}, "model.add_unit_offset", True),
    (DENSE, {"norm_head": True}, "model.norm_head", True),
    (DENSE, {"qk_norm": True}, "qk_norm", False),
    (DENSE, {"out_norms": True}, "out_norms", False),
    (DENSE, {"query_scale": 0.5}, "model.query_pre_attn_scalar", False),
    (DENSE, {"embedding_multiplier": 9.0}, "model.embedding_multiplier", False),
    (DENSE, {"attention_multiplier": 0.5}, "model.attention_multiplier", False),
    (DENSE, {"residual_multiplier": 0.5}, "model.residual_multiplier", False),
    (DENSE, {"logits_scaling": 2.0}, "model.logits_scaling", False),
    (DENSE, {"attention_softcap": 9.0}, "model.attn_logit_softcapping", False),
    (DENSE, {"logit_softcap": 9.0}, "model.final_logit_softcapping", False),
    (DENSE, {"latent": Latent(8, 0, 4, 4, 8)}, "model.head_dim", False),
    (DENSE, {"window_rope": Rope(5.0)}, "window_rope", False),
    (DENSE, {"rope": Rope(interleaved=True)}, "rope.interleaved", False),
    (DENSE, {"rope": Rope(share=0.5)}, "model.rope_scaling", True),
    (DENSE, {"scale_embedding": True}, "scale_embedding", False),
    (DENSE, {"experts": MOE.experts}, "model.num_experts", False),
    (DYNAMIC, {"max_position_embeddings": 9}, "model.max_position_embeddings", True),
    (MOE, {"experts": Experts(8, 2, 48)}, "model.num_experts", False),
    (MOE, {"experts": Experts(4, 3, 48)}, "model.top_k", True),
    (MOE, {"experts": Experts(4, 2, 50)}, "model.moe_intermediate_size", False),
    (MOE, {"experts": Experts(4, 2, 48, normalize=False)}, "model.norm_topk_prob", True),
    (MOE, {"experts": Experts(4, 2, 48, shared_size=9)}, "model.shared_expert_intermediate_size", False),
    (MOE, {"experts": Experts(4, 2, 48, dense_layers=(1,))}, "model.mlp_only_layers", False),
    (MOE, {"experts": Experts(4, 2, 48, groups=2)}, "model.n_group", False),
    (MOE, {"experts": Experts(4, 2, 48, top_groups=2)}, "model.topk_group", False),
    (MOE, {"experts": Experts(4, 2, 48, scale=2.0)}, "model.routed_scaling_factor", False),
    (MOE, {"experts": Experts(4, 2, 48, scoring="sigmoid")}, "scoring", False),
    (MOE, {"experts": Experts(4, 2, 48, shared_gate=False)}, "shared_gate", False),
]  # fmt: skip


@pytest.mark.parametrize(
    ("base", "change", "key", "may_differ"), CHANGES, ids=lambda x: str(x) if isinstance(x, dict | str) else ""
)
def test_a_difference_is_refused_by_the_configs_key_unless_it_is_wanted(
    base: DecoderConfig, change: dict[str, Any], key: str, may_differ: bool
) -> None:
    assert compare_models(base, base, PLACE, LoadCkptInfo()) == []
    other = replace(base, **change)
    with pytest.raises(ConfigError) as caught:
        compare_models(other, base, PLACE, LoadCkptInfo())
    assert f"  {key}" in str(caught.value) and " in there" in str(caught.value)
    name = key.removeprefix("model.")
    assert (name in MAY_DIFFER) == may_differ
    if may_differ and key != "model.use_alibi":  # without a rotary embedding it has no base either
        assert compare_models(other, base, PLACE, LoadCkptInfo(may_differ=(key,)))[0].startswith(f"note: {key} = ")


def test_every_field_of_a_decoder_is_compared() -> None:
    changed = {field for _, change, _, _ in CHANGES for field in change}
    assert changed >= {field.name for field in fields(DecoderConfig)} - {"lora"}  # restore compares adapters


def test_all_differences_are_named_at_once() -> None:
    other = replace(DENSE, num_layers=2, rope=Rope(5.0), tie_embeddings=True)
    with pytest.raises(ConfigError) as caught:
        compare_models(other, DENSE, PLACE, LoadCkptInfo(may_differ=("top_k",)))
    assert [line.split(" = ")[0].strip() for line in str(caught.value).splitlines()[1:-1]] == [
        "model.num_layers", "model.tie_word_embeddings", "model.rope_base",
    ]  # fmt: skip


def test_a_length_that_nothing_uses_and_capacities_are_notes() -> None:
    experts = Experts(4, 2, 48, capacity_factor=1.25, drop_policy="probs")
    mine = replace(MOE, max_position_embeddings=9, experts=experts, intermediate_size=7)  # all layers have experts
    assert [line.split(" = ")[0] for line in compare_models(mine, MOE, PLACE, LoadCkptInfo())] == [
        "note: model.max_position_embeddings", "note: model.moe_layer_kwargs.capacity_factor",
        "note: model.moe_layer_kwargs.drop_policy",
    ]  # fmt: skip


def test_balance_biases_may_start_at_zero_and_may_not_be_left_out() -> None:
    biased = replace(MOE, experts=Experts(4, 2, 48, balance_bias=True))
    assert compare_models(biased, MOE, PLACE, LoadCkptInfo()) == [
        f"note: {BALANCE_BIAS} = True in the config, and False in there"
    ]
    with pytest.raises(
        ConfigError, match="model.moe_layer_kwargs.bias_update_speed.* = False in the config, and True in there"
    ):
        compare_models(MOE, biased, PLACE, LoadCkptInfo())


@pytest.mark.parametrize("name", ["num_layers", "model.vocab_size", "rope_bas"])
def test_only_keys_that_keep_the_weights_may_differ(name: str) -> None:
    with pytest.raises(ValidationError, match="is not one of model_type, rope_base"):
        LoadCkptInfo(may_differ=(name,))


def test_a_run_is_resumed_only_with_its_own_model(tmp_path: Path, config: WriteConfig, run: Run) -> None:
    """The weights of every layer fit here, and only their number differs: nothing else would notice."""
    path = config("run", data__total_steps=1, model__num_layers=3, lr_scheduler__total_steps=None)
    run("train", path)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    failed = run("train", path, "data.total_steps=2", "model.num_layers=2", "model.rope_base=7", "model_type=INTERNLM2", code=2)
    for line in ("model_type = 'INTERNLM2'", "model.num_layers = 2", "model.rope_base = 7.0"):
        assert f"  {line} in the config, and " in failed.stderr
    assert failed.stderr.count("\n") == 5 and "Traceback" not in failed.stderr
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    again = json.dumps({"path": str(tmp_path / "run"), "content": ["model"], "may_differ": ["rope_base"]})
    done = run("train", path, f"ckpt.load_ckpt_info={again}", "model.rope_base=7", f"ckpt.save_ckpt_folder={tmp_path / 'new'}")
    assert "note: model.rope_base = 7.0 in the config, and 10000.0 in" in done.stdout


def test_a_run_that_goes_on_says_which_keys_have_changed(tmp_path: Path, config: WriteConfig, run: Run) -> None:
    path = config("run", data__total_steps=1, lr_scheduler__total_steps=None)
    assert "in the checkpoint" not in run("train", path).stdout
    changed = ("data.total_steps=2", "adam.lr=0.5", "ckpt.keep_last=3")
    notes = [line for line in run("train", path, *changed).stdout.splitlines() if line.startswith("note: ")]
    assert [line.split(" = ")[0] for line in notes] == ["note: data.total_steps", "note: adam.lr"]


def test_a_checkpoint_without_a_config_is_not_compared(tmp_path: Path) -> None:
    parts: Any = SimpleNamespace(recorded=validate(tiny()))
    checkpoint: Any = SimpleNamespace(folder=tmp_path)
    assert _changes(parts, checkpoint) == []
    (tmp_path / "config.json").write_text('{"seed": 7}')
    assert _changes(parts, checkpoint) == ["note: seed = 1024, and was 7 in the checkpoint"]


@pytest.mark.parametrize("ours", [True, False])
def test_the_wrong_format_is_named(tmp_path: Path, ours: bool) -> None:
    (tmp_path / "config.json").write_text("{}")
    if ours:
        (tmp_path / "checkpoints").mkdir()
    info = LoadCkptInfo(path=str(tmp_path), ckpt_type="hf" if ours else "internevo")
    config, world = SimpleNamespace(ckpt=Ckpt(load_ckpt_info=info)), SimpleNamespace(size=1)
    parts: Any = SimpleNamespace(config=config, world=world)
    with pytest.raises(ConfigError, match="leave out ckpt_type = 'hf'" if ours else 'set ckpt_type="hf"'):
        restore(parts, tmp_path / "run")
