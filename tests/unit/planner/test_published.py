"""Rows of a table of measurements, as jobs (``benchmarks/published.py``), and the fit (``benchmarks/plan.py``)."""

import csv
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest

from internevo.planner.calibration import Calibration
from internevo.planner.hardware import GPUS
from tests.conftest import ROOT

ROW = {
    "id": "internevo-001", "gpu": "A100-80GB-SXM", "gpus": "16", "model": "InternLM-7B", "params_b": "7", "layers": "32",
    "hidden": "4096", "ffn": "11008", "heads": "32", "kv_heads": "32", "head_dim": "128", "vocab": "103168", "seq_len": "2048",
    "micro_batch": "2", "grad_accum": "4", "tp": "1", "pp": "1", "zero_stage_or_fsdp": "zero1", "zero_group": "dp",
    "recompute": "none", "precision": "bf16", "metric_tokens_per_s_per_gpu": "4000",
}  # fmt: skip
COLUMNS = [
    *ROW, "experts", "top_k", "expert_ffn", "shared_expert_ffn", "global_batch", "sp", "cp", "vp", "ep", "etp", "compile",
    "metric_tflops_per_gpu", "metric_mfu", "metric_iteration_s", "metric_memory_gb", "note",
]  # fmt: skip


def row(**changes: str) -> dict[str, str]:
    return {**dict.fromkeys(COLUMNS, ""), **ROW, **changes}


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import published

    return published


@pytest.fixture
def plan(published: ModuleType) -> ModuleType:
    import plan

    return plan


def test_a_row_is_a_job(published: ModuleType) -> None:
    found = published.measured(row())
    layout, work = found.job.work.layout, found.job.work
    assert found.group == ("internevo", "a100") and found.tgs == 4000 and found.gpu.network_gb_per_s == 6.25
    assert (layout.world, layout.zero, layout.mode, layout.fsdp, layout.data) == (16, 16, "mtp", False, 16)
    assert (work.tokens, work.micro_batches, found.job.global_tokens) == (4096, 4, 16 * 4 * 4096)


def test_latent_attention_is_that_of_the_public_config(published: ModuleType) -> None:
    shape = {
        "layers": "61", "hidden": "7168", "ffn": "18432", "heads": "128", "kv_heads": "", "vocab": "129280", "experts": "256",
        "top_k": "8", "expert_ffn": "2048", "shared_expert_ffn": "2048", "note": "MLA attention; first 3 layers dense",
    }  # fmt: skip
    decoder = published.measured(row(model="DeepSeek-V3", **shape)).job.work.decoder
    assert decoder.parameters() == pytest.approx(671.03e9, rel=1e-4) and decoder.sparse_layers == 58
    with pytest.raises(published.NotExpressibleError, match="another architecture"):
        published.measured(row(model="Unknown", **shape))


def test_a_mlp_without_a_gate_has_the_same_weights(published: ModuleType) -> None:
    decoder = published.measured(row(model="GPT-7B", ffn="16384")).job.work.decoder
    assert 3 * decoder.intermediate_size == pytest.approx(2 * 16384, abs=2) and decoder.tie_embeddings


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        ({"metric_iteration_s": "2.0"}, 4 * 4096 / 2.0),
        ({"metric_mfu": "0.5"}, None),
        ({"metric_tflops_per_gpu": "156"}, None),
    ],
)
def test_throughput_comes_from_what_a_source_prints(
    metrics: dict[str, str], expected: float | None, published: ModuleType
) -> None:
    found = published.measured(row(metric_tokens_per_s_per_gpu="", **metrics))
    full = found.job.work.decoder.flops_per_token(2048) + 6 * 4096 * 2048 * 32  # without the causal mask's half
    assert found.tgs == pytest.approx(expected or GPUS["a100"].peak("bf16") / 2 / full)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"id": "nobody-001"}, "the source does not say how it runs"),
        ({"metric_tokens_per_s_per_gpu": ""}, "no throughput"),
        ({"note": "task=LoRA"}, "LoRA"),
        ({"note": "MLA attention"}, "another architecture"),
        ({"precision": "nvfp4"}, "precision nvfp4"),
        ({"cp": "2"}, "context parallelism"),
        ({"note": "x; offload_alpha=0.3; y"}, "activations offloaded to the host"),
        ({"gpu": "TPUv5"}, "GPU TPUv5"),
        ({"layers": ""}, "no layers"),
        ({"pp": "5"}, "ranks that do not divide evenly"),
        ({"grad_accum": "", "global_batch": "33"}, "a global batch that micro-batches do not divide"),
        ({"zero_stage_or_fsdp": "zero2"}, "ZeRO-2"),
        ({"recompute": ""}, "recomputation not stated"),
        ({"recompute": "selective"}, "what is recomputed selectively is not stated"),
        ({"pp": "8", "vp": "8"}, "stages without layers"),
    ],
)
def test_a_row_that_does_not_count_says_why(changes: dict[str, str], reason: str, published: ModuleType) -> None:
    with pytest.raises(published.NotExpressibleError, match=f"^{reason}$"):
        published.measured(row(**changes))


def test_what_a_note_says_about_gradients_and_stages(published: ModuleType) -> None:
    assert published.measured(row(id="foundry-001")).job.work.gradient_bytes == 4
    assert published.measured(row(id="foundry-001", note="mp_mode=PURE")).job.work.gradient_bytes == 2
    slots = row(id="bloom-001", pp="4", layers="14", note="layers rebalanced with embeddings as own slots")
    found = published.measured(slots)
    assert found.job.layers == (3, 4, 4, 3) and found.job.keeps_scores


def test_ulysses_is_isp_without_sharded_weights(published: ModuleType) -> None:
    found = published.measured(row(id="xtuner-long-001", cp="4", zero_stage_or_fsdp="", zero_group="", recompute=""))
    layout = found.job.work.layout
    assert (layout.mode, layout.tensor, layout.weight, layout.zero, layout.data, layout.fsdp) == ("isp", 4, 1, 16, 4, True)
    assert found.job.work.recomputed == 1.0


@pytest.mark.parametrize(("sharding", "per_parameter"), [("fsdp", 28 / 8), ("zero1", 4 + 24 / 8)])
def test_memory_of_the_source_by_hand(sharding: str, per_parameter: float, published: ModuleType) -> None:
    """InternEvo: weights and gradients in bf16, masters, moments, gradients in fp32, and what AdamW allocates."""
    this = row(gpus="8", zero_stage_or_fsdp=sharding, recompute="full", metric_memory_gb="50", micro_batch="1")
    predicted, measured = published.memory(this)
    parameters = published.measured(this).job.work.decoder.parameters()
    assert measured == 50 * 2**30
    assert 0 < predicted - per_parameter * parameters - published.CONTEXT < 9e9  # activations, a layer's units, logits


def test_every_vector_is_a_calibration(plan: ModuleType) -> None:
    assert asdict(plan.from_vector(plan.to_vector(Calibration()))) == pytest.approx(asdict(Calibration()))
    for shift in (-50.0, 50.0):
        found = plan.from_vector(plan.to_vector(Calibration()) + shift)
        assert 0 < found.products <= 1 and found.step > 0


def cases(plan: ModuleType, published: ModuleType, true: Calibration) -> list[Any]:
    """Rows whose throughput is what a calibration says."""
    found = []
    for gpus in (8, 64, 512):
        for recompute, micro in (("none", "1"), ("none", "4"), ("full", "2")):
            measured = published.measured(row(gpus=str(gpus), recompute=recompute, micro_batch=micro))
            counts = plan.counts.count(measured.job)
            tgs = plan.step.price(counts, measured.gpu, true).tgs
            found.append(plan.Case(published.replace(measured, tgs=tgs), counts))
    return found


def test_a_fit_finds_what_made_the_measurements(plan: ModuleType, published: ModuleType) -> None:
    rows = cases(plan, published, Calibration(products=0.6, memory=0.5, across=0.4))
    errors = [abs(case.error(plan.fit(rows, Calibration()))) for case in rows]
    assert max(errors) < 0.02


def test_every_row_is_in_one_fold(plan: ModuleType, published: ModuleType) -> None:
    rows = cases(plan, published, Calibration())
    for count, together in ((4, "row"), (20, "row"), (3, "model"), (2, "gpus"), (20, "gpus")):
        folds = plan.folds_of(rows, count, together)
        assert Counter(number for fold in folds for number in fold) == Counter(range(len(rows))) and all(folds)
        if together == "gpus":
            worlds = [{rows[n].measured.job.work.layout.world for n in fold} for fold in folds]
            assert len(worlds) == min(count, 3) and not set.intersection(*worlds)


def test_the_table_is_printed(
    plan: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "measurements.csv"
    rows = [row(id=f"internevo-{n:03}", gpus=str(8 * n), note="pack_sample_into_one=False") for n in range(1, 4)]
    rows += [
        row(id="internevo-009", cp="2"),
        row(id="internevo-010", metric_memory_gb="60", zero_group="8", note=rows[0]["note"]),
    ]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    monkeypatch.setattr(
        "sys.argv", ["plan.py", "--measurements", str(path), "--folds", "2", "--rows", "--pictures", str(tmp_path)]
    )
    plan.main()
    printed = capsys.readouterr().out
    assert "internevo a100" in printed and "1  context parallelism" in printed and "1 rows do not count" in printed
    assert "internevo-010" in printed.split("memory")[0] and printed.count("tp 1 zero") == 2
    assert "rows that are more than 15% off:" in printed and "rows that are more than 10% off:" in printed
    accuracy, scaling = (ElementTree.parse(tmp_path / f"planner-{name}.svg").getroot() for name in ("accuracy", "scaling"))
    titles = [title.text or "" for title in accuracy.iter("{http://www.w3.org/2000/svg}title")]
    assert len(titles) == 4 and titles[0].startswith("internevo-001: 4,000 measured")
    lines = list(scaling.iter("{http://www.w3.org/2000/svg}polyline"))
    assert [line.get("stroke-dasharray") for line in lines] == [None, "6 4"] and "3072" in printed
    monkeypatch.setattr("sys.argv", ["plan.py", "--measurements", str(tmp_path / "none.csv")])
    with pytest.raises(SystemExit, match="is no file"):
        plan.main()
