"""All strategies and their compositions train the same model as one process. A checkpoint loads into any other layout."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from internevo.text.tokenizer import train_bpe
from tests.conftest import metrics, tensors, write_config
from tests.parallel.conftest import Runs, assert_same, assert_same_rows
from tests.parallel.layouts import COMMON, FAMILIES, MODELS, NAMED, STEPS, Case, full_table, layout, pipelined, scheduled, two_d
from tests.pool import Pool


def compare(pool: Pool, world: Runs, tmp_path: Path, processes: int, changes: dict[str, Any], model: str = "llama") -> None:
    _, dataset, one = world
    pool.train(write_config(tmp_path, dataset, "many", **{**COMMON, **{**MODELS, **FAMILIES}[model], **changes}), processes)
    assert_same(tmp_path / "many", one(model, changes.get("data__use_packed_dataset", True)))


@pytest.mark.parametrize("name", NAMED)
def test_a_strategy_trains_the_same_model_as_one_process(pool: Pool, world: Runs, tmp_path: Path, name: str) -> None:
    compare(pool, world, tmp_path, *NAMED[name])


WITH_MUON = [
    "mtp 2", "mtp 4, recomputed", "msp 2, no zero", "msp 2, fsdp, recomputed", "fsp 2, zero 2", "isp: weights over 2",
    "isp 4, weights over 2, zero 2 of 4",
]  # fmt: skip


@pytest.mark.parametrize("name", WITH_MUON)
def test_muon_puts_whole_matrices_together(pool: Pool, world: Runs, tmp_path: Path, name: str) -> None:
    compare(pool, world, tmp_path, *NAMED[name], model="muon")


OF_FAMILIES: dict[str, tuple[str, Case]] = {
    "gemma 3, msp 2, fsdp, recomputed": ("gemma 3", layout(4, "msp", 2, fsdp=True, model__checkpoint=True)),
    "gemma 3, isp 2 x 2, half recomputed": ("gemma 3", layout(4, "isp", 2, 2, model__checkpoint=0.5)),
    "gemma 3, pipeline of 2, mtp 2": ("gemma 3", pipelined(4, 2, layers=6, mode="mtp", tensor=2)),
    "gemma 2, msp 2": ("gemma 2", layout(2, "msp", 2)),
    "gemma 2, fsp 2, attention kept": (
        "gemma 2",
        layout(2, "fsp", 2, model__checkpoint="attention", selective_checkpoint=True),
    ),
    "gemma 2, isp 2 x 2": ("gemma 2", layout(4, "isp", 2, 2)),
    "gemma 2, isp 4, heads over 2, context over 2": ("gemma 2", layout(4, "isp", 4, **two_d(2, 2))),
    "gemma 2, mtp 2, pipeline of 2": ("gemma 2", pipelined(4, 2, layers=2, mode="mtp", tensor=2)),
    "deepseek 2, mtp 2": ("deepseek 2", layout(2, "mtp", 2)),
    "deepseek 2, isp 2 x 2": ("deepseek 2", layout(4, "isp", 2, 2, weights={"overlap": True, "forward_overlap_per": "layer"})),
    "deepseek 2, isp 2, context over 2": ("deepseek 2", layout(2, "isp", 2, **two_d(1, 2))),
    "deepseek 3, msp 2, zero 2, recomputed": ("deepseek 3", layout(4, "msp", 2, model__checkpoint=True)),
    "deepseek 3, mtp 4, whole experts over 2": (
        "deepseek 3",
        layout(4, "mtp", 4, parallel__expert={"size": 2, "no_tp": True}),
    ),
    "deepseek 3, fsp 2, pipeline of 2, ZBH1": (
        "deepseek 3",
        scheduled("ZBH1", pipelined(4, 2, layers=3, mode="fsp", tensor=2)),
    ),
    "deepseek 3, isp 2 x 2, half recomputed, fsdp": (
        "deepseek 3",
        layout(4, "isp", 2, 2, fsdp=True, model__checkpoint=0.7),
    ),
    "glm 4, fsp 2, attention recomputed": ("glm 4", layout(2, "fsp", 2, model__checkpoint="attention")),
    "glm 4, mtp 2": ("glm 4", layout(2, "mtp", 2)),
    "smollm 3, mtp 2, recomputed": ("smollm 3", layout(2, "mtp", 2, model__checkpoint=True)),
    "smollm 3, msp 2, attention recomputed": ("smollm 3", layout(2, "msp", 2, model__checkpoint="attention")),
    "smollm 3, isp 2 x 2, half recomputed": ("smollm 3", layout(4, "isp", 2, 2, model__checkpoint=0.5)),
    "smollm 3, isp 4, context over 2, padded": (
        "smollm 3",
        layout(4, "isp", 4, **two_d(2, 2), data__use_packed_dataset=False),
    ),
    "smollm 3, pipeline of 2, fsp 2": ("smollm 3", pipelined(4, 2, layers=4, mode="fsp", tensor=2)),
    "smollm 3, pipeline of 4, ZBH1": ("smollm 3", scheduled("ZBH1", pipelined(4, 4, layers=4))),
    "granite, mtp 2": ("granite", layout(2, "mtp", 2)),
    "granite, msp 2, fsdp": ("granite", layout(4, "msp", 2, fsdp=True)),
    "granite, isp 2 x 2, recomputed": ("granite", layout(4, "isp", 2, 2, model__checkpoint=True)),
    "granite, fsp 2, pipeline of 2": ("granite", pipelined(4, 2, layers=2, mode="fsp", tensor=2)),
    "phi 3, isp 4, context over 4": ("phi 3, long", layout(4, "isp", 4, **two_d(1, 4))),
    "phi 3, isp 4": ("phi 3, long", layout(4, "isp", 4)),
}


@pytest.mark.parametrize("name", OF_FAMILIES)
def test_families_with_mathematics_of_their_own_train_the_same(pool: Pool, world: Runs, tmp_path: Path, name: str) -> None:
    model, case = OF_FAMILIES[name]
    compare(pool, world, tmp_path, *case, model=model)


ADAPTED = ["mtp 2", "msp 2, fsdp, recomputed", "fsp 4", "isp 2, weights over 2, zero 2, half recomputed"]


@pytest.mark.parametrize("name", NAMED if "INTERNEVO_TEST_FULL_TABLE" in os.environ else ADAPTED)
def test_adapters_are_trained_the_same_in_every_layout(pool: Pool, world: Runs, tmp_path: Path, name: str) -> None:
    compare(pool, world, tmp_path, *NAMED[name], model="adapters")
    mine = tensors(tmp_path / "many", STEPS)
    adapters = [key for key in mine if ".lora." in key and key.startswith("model/")]
    assert len(adapters) == 2 * 2 * 7 and all(mine[key].abs().max() > 0 for key in adapters)
    assert {key.removeprefix("optimizer/").rsplit(".", 1)[0] for key in mine if key.startswith("optimizer/")} == {
        key.removeprefix("model/") for key in adapters
    }


@pytest.mark.parametrize("mode", ["mtp", "msp"])
def test_replicated_key_value_heads_need_no_adapters(pool: Pool, world: Runs, tmp_path: Path, mode: str) -> None:
    """Two ranks have replicas of the one key/value head. Without adapters on k and v there is no gradient to sum over them."""
    compare(pool, world, tmp_path, *layout(2, mode, 2), model="adapters on q and o only")


@pytest.mark.skipif("INTERNEVO_TEST_FULL_TABLE" not in os.environ, reason="takes minutes: INTERNEVO_TEST_FULL_TABLE=1 runs it")
@pytest.mark.parametrize("case", full_table(), ids=lambda case: case[0])
def test_the_full_table_trains_the_same_model_as_one_process(
    pool: Pool, world: Runs, tmp_path: Path, case: tuple[str, Case]
) -> None:
    compare(pool, world, tmp_path, *case[1])


def test_a_run_continues_in_other_layouts(pool: Pool, world: Runs, tmp_path: Path) -> None:
    """msp over 4, isp 2 x 4, FSDP over 3, isp with context, fsp: weights, moments and the position in the data are restored."""
    _, dataset, one = world
    parts = [layout(4, "msp", 4), layout(4, "isp", 2, 4), layout(3, fsdp=True)]
    parts += [layout(4, "isp", 4, **two_d(2, 2)), layout(2, "fsp", 2)]
    for steps, (processes, changes) in enumerate(parts, start=1):
        path = write_config(tmp_path, dataset, "parts", **{**COMMON, **changes, "data__total_steps": steps})
        pool.train(path, processes)
    assert_same(tmp_path / "parts", one("llama", steps=len(parts)), len(parts))


COMPILED = ["mtp 2", "fsp 2, zero 2", "isp 2, weights over 2, zero 2, half recomputed", "isp 4, context over 4, padded"]


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_layers_train_the_same_in_every_mode(pool: Pool, world: Runs, tmp_path: Path, name: str) -> None:
    _, dataset, one = world
    processes, changes = NAMED[name]
    compiled = {**COMMON, **changes, "model__compile": True, "ckpt__enable_save_ckpt": False}
    path = write_config(tmp_path, dataset, "many", **compiled)
    pool.train(path, processes, timeout=600)
    assert_same_rows(tmp_path / "many", one("llama", changes.get("data__use_packed_dataset", True)), STEPS)


@pytest.mark.parametrize("name", ["isp 2, weights over 2, zero 2, half recomputed", "msp 2, fsdp, recomputed", "fsp 2, zero 2"])
def test_overlap_and_buckets_change_no_bit(pool: Pool, world: Runs, tmp_path: Path, name: str) -> None:
    _, dataset, _ = world
    processes, changes = NAMED[name]
    without_overlap = {
        "hybrid_zero_optimizer__overlap_sync_grad": False, "hybrid_zero_optimizer__overlap_sync_param": False,
        "hybrid_zero_optimizer__reduce_bucket_size": 30_000,
        "parallel__weight": {**changes["parallel__weight"], "overlap": False},
    }  # fmt: skip
    for kind, more in (("overlapped", {}), ("not-overlapped", without_overlap)):
        short = {"data__total_steps": 4, "deterministic": True}
        pool.train(write_config(tmp_path, dataset, kind, **{**COMMON, **changes, **more, **short}), processes)
    overlapped, not_overlapped = (
        [(row["step"], row["loss"], row["grad_norm"]) for row in metrics(tmp_path / run)]
        for run in ("overlapped", "not-overlapped")
    )
    assert overlapped == not_overlapped
    assert len(overlapped) == 4
    mine, theirs = tensors(tmp_path / "overlapped", 4), tensors(tmp_path / "not-overlapped", 4)
    assert mine.keys() == theirs.keys()
    assert all(mine[name].equal(tensor) for name, tensor in theirs.items())


@pytest.mark.parametrize(("dtype", "grad_dtype"), [("float16", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")])
@pytest.mark.parametrize("name", ["msp 2, fsdp, recomputed", "isp 2, weights over 2, zero 2, half recomputed", "mtp 2"])
def test_half_precision_follows_one_process(
    pool: Pool, world: Runs, tmp_path: Path, name: str, dtype: str, grad_dtype: str
) -> None:
    """This includes the loss scale of fp16: in the first step it overflows, and every rank must notice that."""
    _, dataset, _ = world
    processes, changes = NAMED[name]
    half = {
        "model__dtype": dtype, "hybrid_zero_optimizer__grad_dtype": grad_dtype, "ckpt__enable_save_ckpt": False,
        "grad_scaler__fp16": {"initial_scale": 2.0**30}, "grad_scaler__backoff_factor": 2.0**-11,
        "grad_scaler__hysteresis": 1, "data__total_steps": 6,
    }  # fmt: skip
    for run, count, more in (("one", 1, layout(1)[1]), ("many", processes, changes)):
        pool.train(write_config(tmp_path, dataset, run, **{**COMMON, **more, **half}), count)
    rows, wanted = metrics(tmp_path / "many"), metrics(tmp_path / "one")
    assert [row["skipped_steps"] for row in rows] == [row["skipped_steps"] for row in wanted]
    assert dtype != "float16" or 0 < rows[-1]["skipped_steps"] < 6
    for row, reference in zip(rows, wanted, strict=True):
        assert abs(row["loss"] - reference["loss"]) <= 2e-3 * reference["loss"]
        if not reference.get("skipped"):
            assert abs(row["grad_norm"] - reference["grad_norm"]) <= 3e-2 * reference["grad_norm"]


@pytest.mark.parametrize("mode", ["msp", "isp"])
def test_samples_are_the_text_of_one_process(pool: Pool, world: Runs, tmp_path: Path, mode: str) -> None:
    """Generation computes one token at a time, so sequences cannot be sharded."""
    _, dataset, _ = world
    train_bpe(["def f(x): return x"] * 5, 300, tmp_path / "tokenizer")
    changes = {"model__vocab_size": 300, "data__tokenizer_path": str(tmp_path / "tokenizer"), "data__total_steps": 1,
               "monitor__sample_prompts": ["def "], "monitor__sample_tokens": 12, "ckpt__enable_save_ckpt": False}  # fmt: skip
    pool.train(write_config(tmp_path, dataset, "one", **changes))
    pool.train(write_config(tmp_path, dataset, "many", **changes, **layout(2, mode, 2, 2 if mode == "isp" else 1)[1]), 2)
    texts = [(tmp_path / name / "samples.jsonl").read_text() for name in ("one", "many")]
    assert texts[0] == texts[1] and json.loads(texts[0])["text"]
