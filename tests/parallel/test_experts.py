"""Experts over ranks train the same model as one process: losses, gradient norms, weights; router counts are equal."""

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import metrics, write_config
from tests.parallel.conftest import Runs, assert_same
from tests.parallel.layouts import COMMON, EXPERTS, layout, pipelined
from tests.pool import Pool

ROWS = 3
"""Rows of a micro-batch. Routing is by micro-batch, so all layouts have the same ones."""
FAMILIES: dict[str, dict[str, Any]] = {
    "capacity": {**EXPERTS, "loss__moe_loss_coeff": 0.1, "loss__moe_z_loss_coeff": 0.01},
    "dropless, no shared expert": {
        "model_type": "QWEN3MOE", "model__num_experts": 4, "model__top_k": 2, "model__moe_intermediate_size": 24,
        "model__moe_type": "Dropless", "model__mlp_only_layers": [0],
    },
}  # fmt: skip
CASES = {
    "2 ranks": layout(2, parallel__expert={"size": 2}),
    "4 ranks": layout(4),
    "2 of 4 ranks": layout(4, parallel__expert={"size": 2}),
    "2 of 4 ranks, zero 4, of experts 1": layout(4, parallel__expert={"size": 2}, parallel__expert_zero1={"size": 1}),
    "2 of 4 ranks, fsdp": layout(4, fsdp=True, parallel__expert={"size": 2}),
    "4 ranks, recomputed": layout(4, model__checkpoint=True),
    "pipeline of 2, 2 ranks": pipelined(4, 2, layers=2),
    "1 rank": layout(4, zero=2, parallel__expert={"size": 1}),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", CASES)
def test_experts_over_ranks_train_the_same_model(pool: Pool, world: Runs, tmp_path: Path, name: str, family: str) -> None:
    folder, dataset, _ = world
    changes = {**COMMON, **FAMILIES[family], "data__total_steps": 4}
    one = folder / f"experts-{list(FAMILIES).index(family)}"
    if not one.exists():
        pool.train(write_config(folder, dataset, one.name, **{**changes, "data__micro_bsz": ROWS}))
    processes, more = CASES[name]
    pool.train(write_config(tmp_path, dataset, "many", **{**changes, **more, "data__micro_bsz": ROWS}), processes)
    assert_same(tmp_path / "many", one, 4)
    for mine, reference in zip(metrics(tmp_path / "many"), metrics(one), strict=True):
        routing, expected = mine["moe"], reference["moe"]
        assert all(routing[key] == expected[key] for key in ("load", "max_load", "dropped"))
        assert routing["auxiliary_loss"] == pytest.approx(expected["auxiliary_loss"], rel=1e-5)
