"""Pipelines train the same model as one process, in every tensor mode, and a checkpoint of theirs loads into any layout."""

import json
from pathlib import Path
from typing import Any

import pytest

from internevo.text.tokenizer import train_bpe
from tests.conftest import metrics, write_config
from tests.parallel.conftest import Runs, assert_same, assert_same_rows
from tests.parallel.layouts import COMMON, EXPERTS, MODELS, PREFETCH, Case, layout, pipelined, scheduled
from tests.pool import Pool


def zbh1(case: Case) -> Case:
    return scheduled("ZBH1", case)


def zbv(case: Case) -> Case:
    return scheduled("ZBV", case)


CASES = {
    "1F1B 2": pipelined(2, 2),
    "1F1B 4": pipelined(4, 4, micro_batches=6),
    "1F1B 2, fsdp 2": pipelined(4, 2, fsdp=True),
    "interleaved 2 x 2, zero 2": pipelined(4, 2, 2),
    "interleaved 3, msp 2": pipelined(6, 3, 2, micro_batches=4, mode="msp", tensor=2),
    "fsp 2, recomputed": pipelined(4, 2, mode="fsp", tensor=2, model__checkpoint=True),
    "isp 2, weights over 2, interleaved, half recomputed": pipelined(
        4, 2, 2, mode="isp", tensor=2, weight=2, weights=PREFETCH, model__checkpoint=0.5
    ),
    "ZBH1 4": zbh1(pipelined(4, 4, micro_batches=6)),
    "ZBH1 2, msp 2, recomputed": zbh1(pipelined(4, 2, mode="msp", tensor=2, model__checkpoint=True)),
    "ZBH1 2, isp 2, weights over 2, half recomputed": zbh1(
        pipelined(4, 2, mode="isp", tensor=2, weight=2, weights=PREFETCH, model__checkpoint=0.5)
    ),
    "ZBV 2, zero 2": zbv(pipelined(4, 2, 2)),
    "ZBV 3, fsp 2": zbv(pipelined(6, 3, 2, mode="fsp", tensor=2)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_pipeline_trains_the_same_model_as_one_process(pool: Pool, world: Runs, tmp_path: Path, name: str) -> None:
    _, dataset, one = world
    processes, changes = CASES[name]
    pool.train(write_config(tmp_path, dataset, "many", **{**COMMON, **changes}), processes)
    assert_same(tmp_path / "many", one("six layers"))


@pytest.mark.parametrize("mode", ["1F1B", "ZBV"])
@pytest.mark.parametrize("model", ["internlm2, tied", "adapters", "alibi", "gemma", "biased, one key/value head"])
def test_other_models(pool: Pool, world: Runs, tmp_path: Path, model: str, mode: str) -> None:
    _, dataset, _ = world
    processes, changes = pipelined(2, 2, layers=4) if mode == "1F1B" else zbv(pipelined(2, 2, 2, layers=4))
    model_changes = {**COMMON, **MODELS[model], "model__num_layers": 4}
    pool.train(write_config(tmp_path, dataset, "one", **{**model_changes, **layout(1)[1]}), 1)
    pool.train(write_config(tmp_path, dataset, "many", **{**model_changes, **changes}), processes)
    assert_same(tmp_path / "many", tmp_path / "one")


def test_a_run_continues_in_and_out_of_pipelines(pool: Pool, world: Runs, tmp_path: Path) -> None:
    """Pipeline of 4, isp, interleaved pipeline with fsp, one process, pipeline with FSDP."""
    _, dataset, one = world
    six: dict[str, Any] = {"model__num_layers": 6}
    parts = [
        pipelined(4, 4, micro_batches=6), layout(4, "isp", 2, 4, **six), pipelined(4, 2, 3, mode="fsp", tensor=2),
        layout(1, **six), pipelined(4, 2, fsdp=True),
    ]  # fmt: skip
    for steps, (processes, changes) in enumerate(parts, start=1):
        pool.train(write_config(tmp_path, dataset, "parts", **{**COMMON, **changes, "data__total_steps": steps}), processes)
    assert_same(tmp_path / "parts", one("six layers", steps=len(parts)), len(parts))


def test_validation_and_samples_go_through_the_pipeline(pool: Pool, world: Runs, tmp_path: Path) -> None:
    _, dataset, _ = world
    train_bpe(["def f(x): return x"] * 5, 300, tmp_path / "tokenizer")
    changes = {
        **COMMON, "model__vocab_size": 300, "data__tokenizer_path": str(tmp_path / "tokenizer"), "data__total_steps": 2,
        "data__valid_folder": str(dataset), "data__valid_every": 1, "data__valid_max_rows": 11,
        "monitor__sample_prompts": ["def "], "monitor__sample_tokens": 12, "ckpt__enable_save_ckpt": False,
    }  # fmt: skip
    layouts = {"one": layout(1, model__num_layers=6), "many": pipelined(6, 3, 2, mode="isp", tensor=2)}
    for name, (processes, more) in layouts.items():
        pool.train(write_config(tmp_path, dataset, name, **{**changes, **more}), processes)
    one, many = (tmp_path / name for name in layouts)
    assert (one / "samples.jsonl").read_text() == (many / "samples.jsonl").read_text()
    rows = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (one, many)]
    losses = [[row["valid_loss"] for row in of_run if "valid_loss" in row] for of_run in rows]
    assert len(losses[0]) == 2 and losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize(("name", "kind"), [("1F1B 2", "gshard"), ("interleaved", "gshard"), ("interleaved", "pooled")])
def test_routers_of_a_pipeline(pool: Pool, world: Runs, tmp_path: Path, name: str, kind: str) -> None:
    """The routers' losses and gradients, and the statistics, which are exact."""
    _, dataset, _ = world
    losses = {"loss__moe_loss_coeff": 0.1, "loss__moe_loss_kind": kind, "loss__moe_z_loss_coeff": 0.01}
    changes = {**COMMON, **EXPERTS, **losses}
    chunks = 1 if name == "1F1B 2" else 2
    layouts = {"one": layout(1, model__num_layers=4, data__micro_bsz=3), "many": pipelined(4, 2, chunks, layers=4)}
    for run, (processes, more) in layouts.items():
        pool.train(write_config(tmp_path, dataset, run, **{**changes, **more}), processes)
    assert_same(tmp_path / "many", tmp_path / "one")
    one, many = (metrics(tmp_path / run) for run in ("one", "many"))
    for mine, reference in zip(many, one, strict=True):
        assert mine["moe"]["load"] == reference["moe"]["load"] and mine["moe"]["dropped"] == reference["moe"]["dropped"]
        assert mine["moe"]["auxiliary_loss"] == pytest.approx(reference["moe"]["auxiliary_loss"], rel=1e-5)


COMPILED = {
    "interleaved": pipelined(2, 2, 2),
    "ZBH1": zbh1(pipelined(2, 2)),
    "ZBH1, mtp 2": zbh1(pipelined(4, 2, mode="mtp", tensor=2)),
    "ZBV, fsp 2, half recomputed": zbv(pipelined(4, 2, 2, mode="fsp", tensor=2, model__checkpoint=0.5)),
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_layers_in_a_pipeline(pool: Pool, world: Runs, tmp_path: Path, name: str) -> None:
    _, dataset, one = world
    processes, changes = COMPILED[name]
    more = {"model__compile": True, "data__total_steps": 3, "ckpt__enable_save_ckpt": False}
    pool.train(write_config(tmp_path, dataset, "many", **{**COMMON, **changes, **more}), processes, timeout=600)
    assert_same_rows(tmp_path / "many", one("six layers"), 3)
