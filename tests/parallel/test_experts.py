"""Experts over ranks train the same model as one process: losses, gradient norms, weights; router counts are equal."""

import itertools
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import metrics, tensors, write_config
from tests.parallel.conftest import Runs, assert_same
from tests.parallel.layouts import COMMON, EXPERTS, PREFETCH, layout, pipelined, scheduled, two_d
from tests.pool import Pool

ROWS = 3
"""Rows of a micro-batch. Routing is by micro-batch, so all layouts have the same ones."""
FAMILIES: dict[str, dict[str, Any]] = {
    "capacity": {**EXPERTS, "loss__moe_loss_coeff": 0.1, "loss__moe_z_loss_coeff": 0.01},
    "dropless, no shared expert": {
        "model_type": "QWEN3MOE", "model__num_experts": 4, "model__top_k": 2, "model__moe_intermediate_size": 24,
        "model__moe_type": "Dropless", "model__mlp_only_layers": [0],
    },
    "muon": {**EXPERTS, "model__moe_type": "Dropless", "muon": {}},
    "frozen, with adapters": {
        **EXPERTS, "loss__moe_loss_coeff": 0.1, "model__lora": {"rank": 3, "alpha": 6, "targets": ["wq", "wo"]},
        "adam__lr": 2e-2, "adam__adam_eps": 1e-3,
    },
}  # fmt: skip


def gathered(ranks: int, overlap: bool = True) -> dict[str, Any]:
    """Returns changes to the config: the weights of experts are sharded over ranks, and gathered for use."""
    return {"parallel__expert_weight": {"size": ranks, "overlap": overlap}}


CASES = {
    "2 ranks": layout(2, parallel__expert={"size": 2}),
    "4 ranks": layout(4),
    "2 of 4 ranks": layout(4, parallel__expert={"size": 2}),
    "2 of 4 ranks, zero 4, of experts 1": layout(4, parallel__expert={"size": 2}, parallel__expert_zero1={"size": 1}),
    "2 of 4 ranks, fsdp": layout(4, fsdp=True, parallel__expert={"size": 2}),
    "4 ranks, recomputed": layout(4, model__checkpoint=True),
    "pipeline of 2, 2 ranks": pipelined(4, 2, layers=2),
    "1 rank": layout(4, zero=2, parallel__expert={"size": 1}),
    "mtp 2": layout(2, "mtp", 2),
    "msp 2, 2 ranks": layout(4, "msp", 2),
    "fsp 2, 1 rank, fsdp, recomputed": layout(4, "fsp", 2, fsdp=True, parallel__expert={"size": 1}, model__checkpoint=True),
    "mtp 2, whole experts on 4 ranks": layout(4, "mtp", 2, parallel__expert={"no_tp": True}),
    "msp 2, whole experts on 2 ranks": layout(2, "msp", 2, parallel__expert={"no_tp": True}),
    "fsp 4, whole experts on 1 rank": layout(4, "fsp", 4, parallel__expert={"no_tp": True, "size": 1}),
    "isp 2": layout(2, "isp", 2),
    "isp 1, weights over 2, experts over 4": layout(4, "isp", 1, 2, weights=PREFETCH),
    "isp 2, weights over 2, expert weights over 4": layout(4, "isp", 2, 2, weights=PREFETCH, **gathered(4)),
    "isp 2, expert weights over 2, recomputed": layout(4, "isp", 2, 1, model__checkpoint=True, **gathered(2)),
    "isp 1, weights over 4, expert weights over 2 x 2, fsdp": layout(4, "isp", 1, 4, fsdp=True, **gathered(2)),
    "isp 4, heads over 2, context over 2": layout(4, "isp", 4, **two_d(2, 2), **gathered(2)),
    "isp 4, context over 2 neighbours, recomputed": layout(
        4, "isp", 4, 1, **two_d(2, 2, False), model__checkpoint=True, parallel__expert={"size": 2}
    ),
    "isp 2, experts on 1 rank": layout(4, "isp", 2, 2, parallel__expert={"size": 1}),
    "ZBH1, 2 ranks": scheduled("ZBH1", pipelined(4, 2, layers=2)),
    "ZBV, msp 2": scheduled("ZBV", pipelined(4, 2, 2, layers=4, mode="msp", tensor=2)),
    "ZBH1, isp 2, expert weights over 2": scheduled(
        "ZBH1", pipelined(4, 2, layers=2, mode="isp", tensor=2, weight=2, weights=PREFETCH, **gathered(2))
    ),
    "1F1B, isp 2, expert weights over 2, recomputed": pipelined(
        4, 2, layers=2, mode="isp", tensor=2, weights=PREFETCH, model__checkpoint=True, **gathered(2)
    ),
}


def test_overlap_changes_no_bit(pool: Pool, world: Runs, tmp_path: Path) -> None:
    _, dataset, _ = world
    for name, overlap in (("overlapped", True), ("not-overlapped", False)):
        processes, changes = layout(4, "isp", 2, 2, weights={**PREFETCH, "overlap": overlap}, **gathered(2, overlap))
        common = {**COMMON, **FAMILIES["capacity"], "data__total_steps": 3, "data__micro_bsz": ROWS, "deterministic": True}
        synchronized = {f"hybrid_zero_optimizer__overlap_sync_{kind}": overlap for kind in ("grad", "param")}
        pool.train(write_config(tmp_path, dataset, name, **{**changes, **common, **synchronized}), processes)
    mine, theirs = (tensors(tmp_path / name, 3) for name in ("overlapped", "not-overlapped"))
    assert mine.keys() == theirs.keys() and all(mine[name].equal(tensor) for name, tensor in theirs.items())


WITH_MUON = [
    "2 of 4 ranks", "2 of 4 ranks, zero 4, of experts 1", "2 of 4 ranks, fsdp", "1 rank", "msp 2, 2 ranks", "mtp 2",
    "msp 2, whole experts on 2 ranks", "isp 2, weights over 2, expert weights over 4",
    "isp 1, weights over 4, expert weights over 2 x 2, fsdp", "isp 2, experts on 1 rank",
    "ZBH1, isp 2, expert weights over 2",
]  # fmt: skip
TRAINED = [
    *zip(CASES, itertools.cycle(["capacity", "dropless, no shared expert"]), strict=False),
    *((name, family) for name in CASES for family in FAMILIES if "frozen" in family and name.startswith("ZB")),
    *((name, "muon") for name in WITH_MUON),
]
"""Frozen experts matter where the gradients of weights are computed apart."""


@pytest.mark.parametrize(("name", "family"), TRAINED)
def test_experts_over_ranks_train_the_same_model(pool: Pool, world: Runs, tmp_path: Path, name: str, family: str) -> None:
    folder, dataset, _ = world
    processes, more = CASES[name]
    layers = more.get("model__num_layers", 2)
    changes = {**COMMON, **FAMILIES[family], "model__num_layers": layers}
    one = folder / f"experts-{list(FAMILIES).index(family)}-{layers}"
    if not one.exists():
        pool.train(write_config(folder, dataset, one.name, **{**changes, "data__micro_bsz": ROWS}))
    pool.train(write_config(tmp_path, dataset, "many", **{**changes, **more, "data__micro_bsz": ROWS}), processes)
    assert_same(tmp_path / "many", one)
    for mine, reference in zip(metrics(tmp_path / "many"), metrics(one), strict=True):
        routing, expected = mine["moe"], reference["moe"]
        assert all(routing[key] == expected[key] for key in ("load", "max_load", "dropped"))
        assert routing["auxiliary_loss"] == pytest.approx(expected["auxiliary_loss"], rel=1e-5)
