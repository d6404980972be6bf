"""Random combinations of all that a layout can have train the same model as one process, with the collectives that they state.
A checkpoint of any of them goes on in any other."""

import hashlib
import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from internevo.config import Config, validate
from internevo.models.families.registry import decoder_config
from internevo.parallel import plan
from internevo.parallel.layout import Layout
from internevo.parallel.strategy import Workload, add_up
from internevo.train import step
from internevo.train.check import problems
from internevo.train.config import load_config
from tests.conftest import metrics, tiny, write_config, write_dataset
from tests.parallel.conftest import assert_same
from tests.parallel.layouts import (
    COMMON,
    DRAWN,
    EXPERT_MODELS,
    FAMILIES,
    MODELS,
    PREFETCH,
    ROWS,
    STEPS,
    Composition,
    composition,
    compositions,
    layout,
    pipelined,
    scheduled,
)
from tests.pool import DEVICE, Pool


def test_every_model_of_the_tables_can_be_trained() -> None:
    """Combinations that cannot be are drawn again, so that a model with a mistake would never be."""
    for name, model in {**MODELS, **FAMILIES, **EXPERT_MODELS}.items():
        assert not problems(validate(tiny(**{**COMMON, **model})), 1), name


One = Callable[[Composition, int], Path]
CHAINS = max(1, DRAWN // 10)
"""Number of random chains of layouts."""


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory, pool: Pool) -> One:
    """Returns the run folder of one process that trains the same. Each is trained once."""
    folder = tmp_path_factory.mktemp("compositions")
    dataset = write_dataset(folder / "data")

    def run(drawn: Composition, steps: int) -> Path:
        changes = {**drawn.one_process, "data__total_steps": steps}
        path = folder / hashlib.sha256(json.dumps(changes, sort_keys=True).encode()).hexdigest()[:16]
        if not path.exists():
            pool.train(write_config(folder, dataset, path.name, **changes), 1)
        return path

    return run


def assert_same_routing(many: Path, one: Path) -> None:
    """Compares what the routers have counted: exactly; and their losses."""
    for mine, reference in zip(metrics(many), metrics(one), strict=True):
        if reference.get("moe") is not None:
            routing, expected = mine["moe"], reference["moe"]
            assert {key: routing[key] for key in ("load", "max_load", "dropped")} == {
                key: expected[key] for key in ("load", "max_load", "dropped")
            }, mine["step"]
            for key in ("entropy", "auxiliary_loss"):
                assert routing[key] == pytest.approx(expected[key], rel=1e-5)


def assert_stated(run: Path, config: Config, processes: int) -> None:
    """Compares the collectives of a step of rank 0 with what the strategies state. How many rows travel to experts depends on
    the router."""
    sizes, decoder = Layout.from_config(config, processes), decoder_config(config.model_type, config.model)
    if decoder.lora is not None:
        return
    micro_batches = (config.data.global_batch_size or 0) // (config.data.micro_bsz * sizes.data)
    work = Workload.from_config(decoder, config, sizes, micro_batches, DEVICE)
    types = len(metrics(run)[0]["loss_by_type"])
    stated = {
        (row.kind, row.axis): (row.count, row.nbytes)
        for row in add_up([*plan.traffic(work), step.traffic(decoder, types, sizes)], sizes)
    }
    counted = {(row["kind"], row["axis"]): (row["count"], row["nbytes"]) for row in json.loads((run / "comm.json").read_text())}
    for key in [key for key in stated if key[0] == "all-to-all" and sizes.expert > 1]:
        assert counted[key][0] == stated[key][0]
        del counted[key], stated[key]
    assert counted == stated


def few_rows(drawn: Composition) -> int:
    """Returns the rows of a global batch for two micro-batches, or for two for each rank of the pipeline."""
    stages = drawn.layout["parallel__pipeline"]["size"]
    data = drawn.processes // (stages * drawn.layout["parallel__tensor"]["size"])
    return min(ROWS, 2 * stages * data * drawn.training["data__micro_bsz"])


@pytest.mark.parametrize("seed", range(DRAWN))
def test_compositions_train_the_same_model_as_one_process(pool: Pool, one_process: One, tmp_path: Path, seed: int) -> None:
    drawn = composition(seed)
    drawn = drawn._replace(training={**drawn.training, "data__global_batch_size": few_rows(drawn)})
    one = one_process(drawn, STEPS)
    path = write_config(tmp_path, one.parent / "data", "many", **drawn.changes, monitor__comm=True)
    pool.train(path, drawn.processes)
    assert_same(tmp_path / "many", one, STEPS)
    assert_same_routing(tmp_path / "many", one)
    assert_stated(tmp_path / "many", load_config(path), drawn.processes)


HALF = {
    "1F1B": pipelined(2, 2), "interleaved": pipelined(2, 2, 2), "ZBH1, zero 2": scheduled("ZBH1", pipelined(4, 2)),
    "ZBV, msp 2": scheduled("ZBV", pipelined(4, 2, 2, mode="msp", tensor=2)),
    "ZBH1, zero 2, as many micro-batches as stages": scheduled("ZBH1", pipelined(4, 2, data__global_batch_size=12)),
    "ZBV, isp, one micro-batch": scheduled(
        "ZBV", pipelined(4, 2, 2, mode="isp", weights={"size": 2}, data__global_batch_size=6)
    ),
    "experts over 4": layout(4), "experts, mtp 2": layout(4, "mtp", 2), "whole experts, msp 2": layout(
        4, "msp", 2, parallel__expert={"no_tp": True}
    ),
    "experts, isp 2 x 2": layout(4, "isp", 2, 2, parallel__expert_weight={"size": 2, "overlap": True}, weights=PREFETCH),
    "experts, fsdp, recomputed": layout(4, fsdp=True, model__checkpoint=True),
    "experts, ZBV": scheduled("ZBV", pipelined(4, 2, 2)),
}  # fmt: skip
"""Layouts in bf16, which are those that run on GPUs."""


@pytest.mark.parametrize("name", HALF)
def test_half_precision_follows_one_process(pool: Pool, one_process: One, tmp_path: Path, name: str) -> None:
    processes, changes = HALF[name]
    model = "dropless experts" if "experts" in name else "llama"
    training = {
        "model__num_layers": changes.get("model__num_layers", 2), "data__micro_bsz": 3, "model__dtype": "bfloat16",
        "data__global_batch_size": changes.get("data__global_batch_size", ROWS),
    }  # fmt: skip
    drawn = Composition(processes, {**changes, "data__micro_bsz": 3}, model, training)
    one = one_process(drawn, STEPS)
    pool.train(write_config(tmp_path, one.parent / "data", "many", **drawn.changes), processes)
    for row, reference in zip(metrics(tmp_path / "many"), metrics(one), strict=True):
        assert row["loss"] == pytest.approx(reference["loss"], rel=2e-3)
        assert row["grad_norm"] == pytest.approx(reference["grad_norm"], rel=5e-2)


@pytest.mark.parametrize("seed", range(CHAINS))
def test_a_run_continues_through_random_layouts(pool: Pool, one_process: One, tmp_path: Path, seed: int) -> None:
    """Weights, moments, what balances the experts, and the position in the data: in each layout two steps."""
    first, *others = islice(compositions(10_000 + seed), 200)
    chain = [first, *[drawn for drawn in others if drawn.one_process == first.one_process][:3]]
    for legs, drawn in enumerate(chain, start=1):
        changes: dict[str, Any] = {**drawn.changes, "data__total_steps": 2 * legs}
        pool.train(
            write_config(tmp_path, one_process(first, 2 * len(chain)).parent / "data", "run", **changes), drawn.processes
        )
    one = one_process(first, 2 * len(chain))
    assert_same(tmp_path / "run", one, 2 * len(chain))
    assert_same_routing(tmp_path / "run", one)
