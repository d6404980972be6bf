"""Balancing without a loss: biases and counts of the routers are those of one process, in every layout and after a resume."""

from pathlib import Path
from typing import Any

import pytest
import torch

from internevo.checkpoint.open import load_model
from internevo.commands.convert import convert
from internevo.errors import UsageError
from internevo.models.decoder import balance_biases
from internevo.models.huggingface.folder import save_hf
from tests.conftest import metrics, tensors, write_config
from tests.parallel.conftest import Runs, assert_same
from tests.parallel.layouts import COMMON, EXPERTS, Case, layout, pipelined
from tests.parallel.test_pipeline import zbv
from tests.pool import Pool

ROWS, STEPS = 3, 3
"""Rows of a micro-batch (routing is by micro-batch, so all layouts have the same ones), and steps."""
SPEED: dict[str, Any] = {
    "model__moe_layer_kwargs": {"bias_update_speed": 0.001},
    "model__num_layers": 4,
    "data__micro_bsz": ROWS,
}
MODELS: dict[str, dict[str, Any]] = {
    "QWEN2MOE, capacity and losses": {
        **EXPERTS, "loss": {"moe_loss_coeff": 0.1, "moe_loss_kind": "pooled", "moe_z_loss_coeff": 0.01},
    },
    "MIXTRALMOE": {"model_type": "MIXTRALMOE", "model__num_experts": 4, "model__top_k": 2, "model__moe_type": "Dropless"},
    "QWEN3MOE, dense layer": {
        "model_type": "QWEN3MOE", "model__num_experts": 4, "model__top_k": 1, "model__moe_type": "Dropless",
        "model__mlp_only_layers": [1],
    },
}  # fmt: skip
CAPACITY, MIXTRAL, QWEN3 = MODELS
CASES: dict[str, tuple[str, Case]] = {
    "zero, experts over 2 ranks": (MIXTRAL, layout(2)),
    "fsdp, experts over 2 ranks, recomputed": (
        CAPACITY, layout(4, fsdp=True, parallel__expert={"size": 2}, model__checkpoint=True)
    ),
    "pipeline of 2, interleaved": (QWEN3, pipelined(4, 2, 2, layers=4)),
    "pipeline of 2, ZBV, msp 2": (
        CAPACITY, zbv(pipelined(4, 2, 2, layers=4, mode="msp", tensor=2))
    ),
    "isp 2 x 2, expert weights over 2": (CAPACITY, layout(4, "isp", 2, 2, parallel__expert_weight={"size": 2})),
    "pipeline of 2, no data ranks": (CAPACITY, pipelined(2, 2, layers=4, micro_batches=8, model__checkpoint=0.5)),
}  # fmt: skip


def train(pool: Pool, world: Runs, folder: Path, name: str, model: str, case: Case, **more: Any) -> Path:
    processes, changes = case
    steps = {"data__total_steps": STEPS}
    pool.train(
        write_config(folder, world[1], name, **{**COMMON, **MODELS[model], **steps, **changes, **SPEED, **more}), processes
    )
    return folder / name


def assert_same_routers(many: Path, one: Path) -> None:
    """Compares all counts of the routers, and their biases bit for bit."""
    assert_same(many, one, STEPS)
    for mine, reference in zip(metrics(many), metrics(one), strict=True):
        assert all(mine["moe"][key] == reference["moe"][key] for key in ("load", "max_load", "dropped")), mine["step"]
        for key in ("entropy", "auxiliary_loss"):
            assert mine["moe"][key] == pytest.approx(reference["moe"][key], rel=1e-5)
    mine, reference = tensors(many, STEPS), tensors(one, STEPS)
    biases = [name for name in reference if name.endswith("router.bias")]
    assert biases and all(reference[name].dtype == torch.float32 and reference[name].any() for name in biases)
    assert all(torch.equal(mine[name], reference[name]) for name in biases)


@pytest.mark.parametrize("name", CASES)
def test_biases_and_counts_are_those_of_one_process(pool: Pool, world: Runs, tmp_path: Path, name: str) -> None:
    model, case = CASES[name]
    one = world[0] / f"balanced-{list(MODELS).index(model)}"
    if not one.exists():
        train(pool, world, world[0], one.name, model, layout(1))
    assert_same_routers(train(pool, world, tmp_path, "many", model, case), one)


def test_a_run_continues_with_its_biases_in_other_layouts(pool: Pool, world: Runs, tmp_path: Path) -> None:
    one = train(pool, world, tmp_path, "one", CAPACITY, layout(1))
    for steps, case in zip((1, 2, STEPS), (pipelined(4, 2, 2, layers=4), layout(1), layout(2, fsdp=True)), strict=True):
        train(pool, world, tmp_path, "parts", CAPACITY, case, data__total_steps=steps)
    assert_same_routers(tmp_path / "parts", one)


def test_biases_start_at_zero_for_weights_without_them_and_are_never_lost_in_silence(
    pool: Pool, world: Runs, tmp_path: Path
) -> None:
    """From a run and from a Hugging Face folder without biases; and back."""
    plain: dict[str, Any] = {**layout(1)[1], "data__micro_bsz": ROWS, "model__moe_layer_kwargs": {}, "model__num_layers": 4}

    def train_plain(name: str, steps: int, **more: Any) -> None:
        changes = {**COMMON, **MODELS[QWEN3], **plain, "data__total_steps": steps, **more}
        pool.train(write_config(tmp_path, world[1], name, **changes))

    train_plain("run", 2)
    convert(tmp_path / "run", tmp_path / "hf", "hf")
    load = {"path": str(tmp_path / "hf"), "content": ["model"], "ckpt_type": "hf"}
    train_plain("wanted", 1, ckpt__load_ckpt_info=load)
    train(pool, world, tmp_path, "tuned", QWEN3, layout(2), data__total_steps=1, ckpt__load_ckpt_info=load)
    assert metrics(tmp_path / "tuned")[0]["loss"] == pytest.approx(metrics(tmp_path / "wanted")[0]["loss"], rel=1e-5)

    train(pool, world, tmp_path, "run", QWEN3, layout(2), data__total_steps=3)
    biases = {name: bias for name, bias in tensors(tmp_path / "run", 3).items() if name.endswith("router.bias")}
    assert len(biases) == 3 and all(bias.abs().max() == torch.tensor(0.001) for bias in biases.values())
    with pytest.raises(
        AssertionError, match=r"balance bias of the routers \(.*bias_update_speed\) = False in the config, and True"
    ):
        train_plain("run", 4)
    kept = {"model__moe_layer_kwargs": {"bias_update_speed": 0}}
    train(pool, world, tmp_path, "run", QWEN3, layout(1), data__total_steps=4, **kept)
    after = tensors(tmp_path / "run", 4)
    assert all(torch.equal(after[name], bias) for name, bias in biases.items())


def test_biases_are_used_after_training_and_an_export_without_them_is_refused(pool: Pool, world: Runs, tmp_path: Path) -> None:
    speed = {"model__moe_layer_kwargs": {"bias_update_speed": 0.2}}
    run = train(pool, world, tmp_path, "run", MIXTRAL, layout(1), data__total_steps=1, **speed)
    tokens = torch.arange(48).view(1, -1)
    model = load_model(run, dtype=torch.bfloat16)
    convert(run, tmp_path / "ours", "internevo", dtype=torch.bfloat16)
    again = load_model(tmp_path / "ours", dtype=torch.bfloat16)
    assert torch.equal(model(tokens), again(tokens))
    biases = balance_biases(again.numbered_layers())
    assert len(biases) == 4 and all(bias.abs().max() == torch.tensor(0.2) for bias in biases.values())
    with pytest.raises(UsageError, match="its routers have balance biases"):
        convert(run, tmp_path / "hf", "hf")
    with pytest.raises(AssertionError, match=r"enable_internevo2hf_ckpt.*balance biases"):
        train(pool, world, tmp_path, "other", MIXTRAL, layout(1), ckpt__enable_internevo2hf_ckpt=True)
    for bias in biases.values():
        bias.zero_()
    assert not torch.equal(model(tokens), again(tokens))
    save_hf(again, tmp_path / "hf")  # biases of 0 change nothing
    assert torch.equal(load_model(tmp_path / "hf", dtype=torch.bfloat16)(tokens), again(tokens))
