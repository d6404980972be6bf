"""A dense model whose MLPs become experts computes the same, in transformers and here, and its loss starts unchanged."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from internevo import load_model, save_hf
from internevo.checkpoint import Checkpoint
from internevo.commands.convert import convert
from internevo.errors import UsageError
from internevo.models.config import DecoderConfig, Experts
from internevo.models.huggingface.folder import HfFolder
from internevo.models.moe import MoE
from tests.conftest import Run, metrics, random_model, write_config

SHAPE: dict[str, Any] = dict(
    vocab_size=97, hidden_size=32, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=64, pad_token_id=None,
)  # fmt: skip
DENSE: dict[str, tuple[Any, str]] = {
    "MIXTRALMOE": (tf.LlamaConfig(**SHAPE, head_dim=16, tie_word_embeddings=True), "MixtralForCausalLM"),
    "QWEN2MOE": (
        tf.Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=5, max_window_layers=1), "Qwen2MoeForCausalLM"
    ),
    "QWEN3MOE": (tf.Qwen3Config(**SHAPE, head_dim=16, attention_bias=True), "Qwen3MoeForCausalLM"),
}  # fmt: skip
TINY = DecoderConfig("LLAMA2", 97, 32, 40, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8)


def dense(folder: Path, config: Any) -> Any:
    """Writes a dense model of transformers with random weights, biases and norms."""
    torch.manual_seed(0)
    auto: Any = tf.AutoModelForCausalLM
    model = auto.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("family", DENSE)
def test_the_logits_are_those_of_the_dense_model(tmp_path: Path, family: str) -> None:
    config, architecture = DENSE[family]
    model, tokens = dense(tmp_path / "dense", config), torch.randint(0, 97, (2, 20))
    convert(tmp_path / "dense", tmp_path / "hf", "hf", upcycle=5, top_k=2, seed=3)
    convert(tmp_path / "dense", tmp_path / "ours", "internevo", upcycle=5, top_k=2, seed=3)
    convert(tmp_path / "ours", tmp_path / "again", "hf")
    auto: Any = tf.AutoModelForCausalLM
    theirs, ours = auto.from_pretrained(tmp_path / "hf").eval(), load_model(tmp_path / "ours")
    assert type(theirs).__name__ == architecture and ours.config.family == family
    wanted = model(tokens).logits
    for found in (theirs(tokens).logits, ours(tokens), load_model(tmp_path / "hf")(tokens)):
        assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "hf" / "model.safetensors").read_bytes()


def test_experts_are_copies_and_routers_are_random(tmp_path: Path) -> None:
    model = random_model(TINY)
    save_hf(model, tmp_path / "dense", dtype=torch.bfloat16)
    for name, seed in (("a", None), ("b", 0), ("c", 1)):
        convert(tmp_path / "dense", tmp_path / name, "hf", upcycle=4, top_k=3, seed=seed)
    a, b, c = (load_model(tmp_path / name) for name in "abc")
    assert (
        a.config.experts == Experts(4, 3, 40)
        and HfFolder(tmp_path / "a").dtype_of("layers.1.mlp.router.weight") == torch.bfloat16
    )
    dense_weights = dict(load_model(tmp_path / "dense").named_parameters())
    for (number, layer), (_, other) in zip(a.numbered_layers(), c.numbered_layers(), strict=True):
        assert isinstance(layer.mlp, MoE) and isinstance(other.mlp, MoE)
        for part in ("gate", "up", "down"):
            wanted = dense_weights[f"layers.{number}.mlp.{part}.weight"]
            assert all(torch.equal(expert, wanted) for expert in getattr(layer.mlp.experts, part).weight)
        router = layer.mlp.router.weight
        assert 0.015 < router.std() < 0.025 and not torch.equal(router, other.mlp.router.weight)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_training_starts_with_the_loss_of_the_dense_model(tmp_path: Path, dataset: Path, run: Run) -> None:
    save_hf(random_model(replace(TINY, intermediate_size=48)), tmp_path / "dense")
    convert(tmp_path / "dense", tmp_path / "sparse", "internevo", upcycle=4, top_k=2)
    convert(tmp_path / "dense", tmp_path / "same", "internevo")
    experts = {"model_type": "MIXTRALMOE", "model__num_experts": 4, "model__top_k": 2, "model__moe_type": "Dropless"}
    losses = []
    for name, changes in (("same", {}), ("sparse", experts)):
        load = {"path": str(tmp_path / name), "content": ["model"]}
        more = {"model__layer_norm_epsilon": TINY.norm_eps, "ckpt__load_ckpt_info": load, "data__total_steps": 1}
        run("train", write_config(tmp_path, dataset, f"run-{name}", **{**changes, **more}))
        losses.append(metrics(tmp_path / f"run-{name}")[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (replace(TINY, family="MIXTRALMOE", experts=Experts(4, 2, 40)), {}, "already has 4 experts per layer .MIXTRALMOE."),
        (replace(TINY, mlp_bias=True), {}, "(?s)no family with experts .* LLAMA2 model:.*MIXTRALMOE: .* its mlp_bias is True"),
        (TINY, {"top_k": 5}, "--upcycle 4 needs --top-k, .*: 1 to 4, not 5"),
        (TINY, {"top_k": None}, "--upcycle 4 needs --top-k, .*: 1 to 4$"),
        (TINY, {"upcycle": None}, "--top-k is only for --upcycle"),
        (TINY, {"upcycle": 65_537}, "--upcycle 65537: a layer can have at most 65536 experts"),
        (TINY, {"upcycle": None, "top_k": None, "seed": 1}, "--seed is only for --upcycle"),
        (TINY, {"write_as": "LLAMA2"}, "LlamaForCausalLM cannot describe this model: it has experts, and the folder cannot"),
    ],
)
def test_what_cannot_be_upcycled_is_refused_and_nothing_is_written(
    tmp_path: Path, config: DecoderConfig, options: dict[str, Any], message: str
) -> None:
    save_hf(random_model(config), tmp_path / "source")
    with pytest.raises(UsageError, match=message):
        convert(tmp_path / "source", tmp_path / "target", "hf", **{"upcycle": 4, "top_k": 2, **options})
    assert not (tmp_path / "target").exists()


def test_a_target_that_exists_is_refused(tmp_path: Path, run: Run) -> None:
    save_hf(random_model(replace(TINY, family="INTERNLM2")), tmp_path / "source")
    done = ("convert", tmp_path / "source", tmp_path / "target", "--to", "internevo", "--upcycle", 4, "--top-k", 2)
    run(*done)
    assert Checkpoint(tmp_path / "target").config == replace(TINY, family="MIXTRALMOE", experts=Experts(4, 2, 40))
    assert "not empty" in run(*done, code=2).stderr
