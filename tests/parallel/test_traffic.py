"""The collectives of a real step are those that the strategies state: kinds, groups, counts and bytes."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from internevo.models.families.registry import decoder_config
from internevo.parallel import plan
from internevo.parallel.layout import Layout
from internevo.parallel.strategy import Workload, add_up
from internevo.train import step
from internevo.train.config import load_config
from tests.conftest import run, write_config, write_dataset
from tests.parallel.layouts import EXPERTS, FAMILIES, MODELS, NAMED, PREFETCH, RECOMPUTED, layout, pipelined
from tests.pool import DEVICE, Pool

MICRO_BATCHES = 3


Counts = dict[tuple[str, str], tuple[int, int]]


def counted(pool: Pool, tmp_path: Path, processes: int, changes: dict[str, Any], model: str = "llama") -> tuple[Counts, Counts]:
    """Returns (kind, axis) -> (count, bytes) twice: as counted in a real step, and as the strategies state it."""
    dataset = write_dataset(tmp_path / "data")
    ranks = processes // (changes["parallel__tensor"]["size"] * changes.get("parallel__pipeline", {"size": 1})["size"])
    sizes = {"data__micro_bsz": 1, "data__global_batch_size": MICRO_BATCHES * ranks, "data__total_steps": 2}
    more = {"model__vocab_size": 96 + 4 * 2, "ckpt__enable_save_ckpt": False, "monitor__comm": True}
    path = write_config(tmp_path, dataset, "run", **{**more, **{**MODELS, **FAMILIES}[model], **changes, **sizes})
    pool.train(path, processes)
    config = load_config(path)
    rows = json.loads((tmp_path / "run" / "comm.json").read_text())
    found = {(row["kind"], row["axis"]): (row["count"], row["nbytes"]) for row in rows}
    decoder, layout = decoder_config(config.model_type, config.model), Layout.from_config(config, processes)
    work = Workload.from_config(decoder, config, layout, MICRO_BATCHES, DEVICE)
    stated = add_up([*plan.traffic(work), step.traffic(decoder, 2, layout)], layout)
    return found, {(row.kind, row.axis): (row.count, row.nbytes) for row in stated}


WHOLE_EXPERTS: dict[str, Any] = {"parallel__expert": {"size": 1}}
CASES: dict[str, Any] = {
    **NAMED,
    "zero 1: plain data parallel": layout(4, zero=1),
    "zero 2 of 4": layout(4, zero=2),
    "fsdp 2 of 4": layout(4, zero=2, fsdp=True),
    "buckets": layout(2, hybrid_zero_optimizer__reduce_bucket_size=30_000),
    "bf16, gradients in bf16": layout(
        4, "msp", 2, model__dtype="bfloat16", hybrid_zero_optimizer={"grad_dtype": "torch.bfloat16", "clip_grad_norm": 1.0}
    ),
    "mtp 2, attention recomputed": layout(2, "mtp", 2, model__checkpoint="attention"),
    "msp 2, attention recomputed": layout(2, "msp", 2, model__checkpoint="attention"),
    "fsp 2, half recomputed": layout(2, "fsp", 2, model__checkpoint=0.5),
    "isp 2 x 2, attention recomputed": layout(2, "isp", 2, 2, weights=PREFETCH, model__checkpoint="attention"),
    "mtp 4, two replicas of each key/value head": layout(4, "mtp", 4),
    "msp 2, one key/value head": (*layout(2, "msp", 2), "biased, one key/value head"),
    "muon, zero 2 of 4": (*layout(4, zero=2), "muon"),
    "muon, plain data parallel": (*layout(4, zero=1), "muon"),
    "muon, mtp 4, two replicas of each key/value head": (*layout(4, "mtp", 4), "muon"),
    "muon, isp 4, weights over 2, zero 2 of 4": (*NAMED["isp 4, weights over 2, zero 2 of 4"], "muon"),
    "muon, pipeline of 2, interleaved, zero 2": (*pipelined(4, 2, 2), "muon"),
    "muon, fsdp 2 of 4, bf16": (*layout(4, zero=2, fsdp=True, model__dtype="bfloat16"), "muon"),
    "pipeline of 4": pipelined(4, 4),
    "pipeline of 2, interleaved, zero 2": pipelined(4, 2, 2),
    "pipeline of 3, msp 2, tied": (*pipelined(6, 3, mode="msp", tensor=2), "internlm2, tied"),
    "pipeline of 2, isp 2 x 2, half recomputed": pipelined(4, 2, mode="isp", tensor=2, weight=2, model__checkpoint=0.5),
    "pipeline of 2, fsdp": pipelined(4, 2, fsdp=True),
    "deepseek 2, mtp 2, recomputed": (*layout(2, "mtp", 2, **RECOMPUTED, **WHOLE_EXPERTS), "deepseek 2"),
    "deepseek 3, msp 2": (*layout(2, "msp", 2, **WHOLE_EXPERTS), "deepseek 3"),
    "deepseek 3, fsp 2, attention recomputed": (
        *layout(2, "fsp", 2, model__checkpoint="attention", **WHOLE_EXPERTS), "deepseek 3",
    ),
    "deepseek 3, isp 2 x 2, half recomputed": (
        *layout(4, "isp", 2, 2, model__checkpoint=0.5, **WHOLE_EXPERTS), "deepseek 3",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_step_has_exactly_the_collectives_that_its_strategies_state(pool: Pool, tmp_path: Path, name: str) -> None:
    found, stated = counted(pool, tmp_path, *CASES[name])
    assert found == stated


def test_experts_have_the_collectives_of_other_weights(pool: Pool, tmp_path: Path) -> None:
    found, stated = counted(pool, tmp_path, *layout(4, zero=2, **EXPERTS, parallel__expert={"size": 1}))
    assert found == stated


MIXED = {
    **EXPERTS,
    "model_type": "QWEN3MOE",
    "model__num_shared_experts": 0,
    "model__moe_type": "Dropless",
    "model__mlp_only_layers": [0],
}
"""Dropless experts without a shared one, and one layer without experts."""
EXPERTS_OVER_RANKS = {
    "2 of 4, muon": layout(4, **EXPERTS, parallel__expert={"size": 2}, muon={}),
    "isp 2, expert weights over 2, muon": layout(4, "isp", 2, 2, **EXPERTS, parallel__expert_weight={"size": 2}, muon={}),
    "2 of 4": layout(4, **EXPERTS, parallel__expert={"size": 2}),
    "2 of 4, fsdp, recomputed": layout(4, **EXPERTS, parallel__expert={"size": 2}, fsdp=True, model__checkpoint=True),
    # The gradients of the router's sums arrive after the experts' backward pass; the experts are not gathered again.
    "mtp 2 whole, fsdp, pooled": layout(
        4, "mtp", 2, **MIXED, parallel__expert={"no_tp": True}, fsdp=True,
        loss={"moe_loss_coeff": 0.1, "moe_loss_kind": "pooled"},
    ),
    "4": layout(4, **EXPERTS),
    "2, in a pipeline": pipelined(4, 2, layers=2, **EXPERTS),
    "2, in a pipeline, pooled": pipelined(4, 2, layers=2, **EXPERTS, loss={"moe_loss_coeff": 0.1, "moe_loss_kind": "pooled"}),
    **{
        f"{mode} 2{' whole' * no_tp}{' recomputed' * recomputed}{' no shared' * (not shared)}": layout(
            4, mode, 2, **(EXPERTS if shared else MIXED), parallel__expert={"no_tp": no_tp}, model__checkpoint=recomputed
        )
        for mode, no_tp, recomputed, shared in [
            ("mtp", False, False, True), ("mtp", False, True, False), ("mtp", True, True, True), ("mtp", True, False, False),
            ("msp", False, True, True), ("msp", True, True, False), ("msp", True, False, True), ("fsp", False, True, False),
            ("fsp", False, False, True), ("fsp", True, True, True),
        ]
    },
    "isp 2 x 2": layout(4, "isp", 2, 2, **EXPERTS, weights=PREFETCH),
    "isp 2 x 1, expert weights over 2, recomputed": layout(
        4, "isp", 2, 1, **MIXED, parallel__expert_weight={"size": 2, "overlap": True}, model__checkpoint=True
    ),
    "isp 2 x 2, expert weights over 4, fsdp": layout(
        4, "isp", 2, 2, **EXPERTS, fsdp=True, parallel__expert_weight={"size": 4, "overlap": True}, weights=PREFETCH
    ),
    "ZBH1, isp 2 x 2, expert weights over 2": pipelined(
        4, 2, layers=4, **MIXED, mode="isp", tensor=2, weight=2, parallel__expert_weight={"size": 2}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPERTS_OVER_RANKS)
def test_experts_over_ranks_have_the_collectives_that_are_stated(pool: Pool, tmp_path: Path, name: str) -> None:
    """How many rows travel depends on the router, so that only the number of all-to-alls is exact."""
    found, stated = counted(pool, tmp_path, *EXPERTS_OVER_RANKS[name])
    moved = [key for key in stated if key[0] == "all-to-all"]
    assert {key: found[key][0] for key in moved} == {key: stated[key][0] for key in moved}
    for key in moved:
        assert found.pop(key)[1] == pytest.approx(stated.pop(key)[1], rel=0.3)
    assert found == stated


def test_the_console_shows_the_table_of_collectives(tmp_path: Path) -> None:
    path = write_config(tmp_path, write_dataset(tmp_path / "data"), **layout(2, "msp", 2)[1], model__vocab_size=100,
                        data__total_steps=2, monitor__comm=True)  # fmt: skip
    lines = run("train", path, "--nproc", 2).stdout.splitlines()
    assert any(line.split()[:3] == ["reduce-scatter", "tensor", "2"] for line in lines)


@pytest.mark.parametrize(
    ("unit", "fsdp", "compiled"),
    [
        ("layer", False, False),
        ("module", False, False),
        ("layer", True, False),
        ("module", True, False),
        ("layer", False, True),
    ],
)
def test_isp_gathers_weights_before_they_are_needed(pool: Pool, tmp_path: Path, unit: str, fsdp: bool, compiled: bool) -> None:
    """Also in the first forward pass of a step, in which the data axis gathers the weights, too."""
    weights = {"overlap": True, "forward_overlap_per": unit}
    processes, changes = layout(4, "isp", 1, 2, fsdp=fsdp, weights=weights, model__num_layers=4, monitor__trace=True)
    dataset = write_dataset(tmp_path / "data")
    more = {"data__total_steps": 3, "ckpt__enable_save_ckpt": False, "data__micro_bsz": 3, "model__vocab_size": 100,
            "model__compile": compiled}  # fmt: skip
    pool.train(write_config(tmp_path, dataset, "run", **{**changes, **more}), processes)
    trace = json.loads(gzip.decompress((tmp_path / "run" / "trace-rank0.json.gz").read_bytes()))["traceEvents"]
    signs = {"all_gather_into_tensor": "g", "all_gather_into_tensor_coalesced": "g", "wait_tensor": "w"}
    signs = {f"_c10d_functional::{name}": sign for name, sign in signs.items()} | {"aten::mm": "."}
    events = sorted((event["ts"], signs[event["name"]]) for event in trace if event.get("name") in signs)
    order = "".join(sign for _, sign in events)
    if unit == "layer":  # in every layer but the last, all weights of the next layer
        assert order.count("gggg") == 3, order
    else:  # always the next weights; two gathers in a row only at the beginning of a pass
        assert order.count("gg") == 2, order
