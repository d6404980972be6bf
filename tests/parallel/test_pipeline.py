"""Pipelines train the same model as one process, in every tensor mode, and a checkpoint of theirs loads into any layout."""

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import write_config
from tests.parallel.layouts import COMMON, MODELS, PREFETCH, Case, layout
from tests.parallel.test_strategies import Runs, assert_same, world  # noqa: F401
from tests.pool import Pool

LAYERS = {"model__num_layers": 6}


def pipeline(processes: int, stages: int, chunks: int = 1, micro_batches: int = 4, tensor: int = 1, **more: Any) -> Case:
    processes, changes = layout(processes, tensor=tensor, **more)
    rows = 24 // (micro_batches * (processes // (stages * tensor)))
    return processes, {
        **LAYERS, **changes, "parallel__pipeline": {"size": stages}, "model__num_chunks": chunks, "data__micro_bsz": rows,
    }


CASES = {
    "1F1B 2": pipeline(2, 2),
    "1F1B 4": pipeline(4, 4, micro_batches=6),
    "1F1B 2, fsdp 2": pipeline(4, 2, fsdp=True),
    "interleaved 2 x 2, zero 2": pipeline(4, 2, 2),
    "interleaved 3, msp 2": pipeline(6, 3, 2, micro_batches=4, mode="msp", tensor=2),
    "fsp 2, recomputed": pipeline(4, 2, mode="fsp", tensor=2, model__checkpoint=True),
    "isp 2, weights over 2, interleaved, half recomputed": pipeline(
        4, 2, 2, mode="isp", tensor=2, weight=2, weights=PREFETCH, model__checkpoint=0.5
    ),
}
TIED = {"four layers, internlm2, tied": pipeline(6, 3, mode="mtp", tensor=2)}


@pytest.mark.parametrize("name", CASES)
def test_a_pipeline_trains_the_same_model_as_one_process(pool: Pool, world: Runs, tmp_path: Path, name: str) -> None:
    _, dataset, one = world
    processes, changes = CASES[name]
    pool.train(write_config(tmp_path, dataset, "many", **{**COMMON, **changes}), processes)
    assert_same(tmp_path / "many", one("six layers"))


@pytest.mark.parametrize("model", ["internlm2, tied", "adapters", "alibi", "gemma"])
def test_other_models(pool: Pool, world: Runs, tmp_path: Path, model: str) -> None:
    _, dataset, one = world
    processes, changes = pipeline(4, 2, mode="mtp", tensor=2, model__num_layers=2)
    pool.train(write_config(tmp_path, dataset, "many", **{**COMMON, **MODELS[model], **changes, "model__num_layers": 2}), processes)
    assert_same(tmp_path / "many", one(model))
