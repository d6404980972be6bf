"""The measured memory of every rank is that of the formula."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import run, write_config, write_dataset
from tests.parallel.layouts import DEEPSEEK, EXPERTS, PADDED, PREFETCH, RECOMPUTED, layout, pipelined, scheduled, two_d
from tests.pool import Pool

SHAPE = {
    "model__num_layers": 3, "model__hidden_size": 128, "model__num_attention_heads": 8, "model__num_kv_attention_heads": 2,
    "model__intermediate_size": 320, "model__vocab_size": 512, "data__seq_len": 128, "data__total_steps": 1,
    "monitor__memory": True, "ckpt__enable_save_ckpt": False,
}  # fmt: skip
BF16: dict[str, Any] = {"model__dtype": "torch.bfloat16"}
DROPLESS: dict[str, Any] = {"model__moe_type": "Dropless"}
PARTS = ("masters", "moments", "state", "activations")
GEMMA3: dict[str, Any] = {
    "model_type": "GEMMA3", "model__use_sliding_window": True, "model__sliding_window": 9, "model__num_layers": 6,
}  # fmt: skip
SMOLLM3: dict[str, Any] = {"model_type": "SMOLLM3", "model__no_rope_layer_interval": 2}
DEEPSEEK_MEMORY: dict[int, dict[str, Any]] = {
    version: {
        **DEEPSEEK, "model_type": f"DEEPSEEKV{version}", "model__num_layers": 3, "model__kv_lora_rank": 64, "model__top_k": 2,
        "model__q_lora_rank": 48 if version == 3 else None, "model__qk_nope_head_dim": 32, "model__qk_rope_head_dim": 16,
        "model__v_head_dim": 32, "parallel__expert": {"size": 1},
    }
    for version in (2, 3)
}  # fmt: skip
CASES = {
    "one process": layout(1),
    "one process, bf16": layout(1, model__dtype="torch.bfloat16"),
    "zero 2 of 4, bf16": layout(4, zero=2, model__dtype="torch.bfloat16"),
    "zero 2, bf16, gradients in bf16": layout(
        2, model__dtype="torch.bfloat16", hybrid_zero_optimizer={"grad_dtype": "torch.bfloat16", "clip_grad_norm": 1.0}
    ),
    "fsdp": layout(2, fsdp=True),
    "mtp 2": layout(2, "mtp", 2),
    "mtp 4, two replicas of each key/value head": layout(4, "mtp", 4),
    "msp 2, zero 2": layout(4, "msp", 2),
    "msp 2, bf16": layout(2, "msp", 2, model__dtype="torch.bfloat16"),
    "fsp 4": layout(4, "fsp", 4),
    "fsp 2, recomputed": layout(2, "fsp", 2, model__checkpoint=True),
    "mtp 2, attention recomputed": layout(2, "mtp", 2, model__checkpoint="attention"),
    "half recomputed, attention kept": layout(1, model__checkpoint=0.67, selective_checkpoint=True),
    "isp 2 x 2": layout(2, "isp", 2, 2, weights={"overlap": True}),
    "isp 4 x 2": layout(4, "isp", 4, 2, weights={"overlap": True}),
    "isp 2, context over 2": layout(2, "isp", 2, **two_d(1, 2)),
    "isp 4, context over 2, padded, half recomputed": layout(4, "isp", 4, **two_d(2, 2), **PADDED, model__checkpoint=0.5),
    "isp 4 x 2, context over 4, bf16, attention kept": layout(
        4, "isp", 4, 2, **two_d(1, 4), **BF16, model__checkpoint="attention", selective_checkpoint=True
    ),
    "smollm 3, isp 4, context over 2": layout(4, "isp", 4, **SMOLLM3, **two_d(2, 2)),
    "deepseek 3, isp 2, context over 2": layout(2, "isp", 2, **DEEPSEEK_MEMORY[3], **two_d(1, 2)),
    "muon": layout(1, muon={}),
    "muon, zero 2 of 4, bf16": layout(4, zero=2, muon={}, **BF16),
    "muon, isp 2 x 2": layout(4, "isp", 2, 2, muon={}),
    "muon, experts over 2 of 4 ranks": layout(4, **EXPERTS, **DROPLESS, muon={}, parallel__expert={"size": 2}),
    "qwen3": layout(2, "fsp", 2, model_type="QWEN3"),
    "qwen3, isp": layout(2, "isp", 2, model_type="QWEN3"),
    "gemma 3, fsp 2": layout(2, "fsp", 2, **GEMMA3),
    "gemma 3, isp 2 x 2, half recomputed": layout(2, "isp", 2, 2, **GEMMA3, model__checkpoint=0.5),
    "smollm 3, isp 2, attention recomputed": layout(2, "isp", 2, **SMOLLM3, model__checkpoint="attention"),
    "granite, mtp 2": layout(2, "mtp", 2, model_type="GRANITE", model__residual_multiplier=0.3, model__logits_scaling=3.0),
    "gemma 2, mtp 2": layout(2, "mtp", 2, model_type="GEMMA2"),
    "deepseek 2, mtp 2": layout(2, "mtp", 2, **DEEPSEEK_MEMORY[2]),
    "deepseek 3, msp 2": layout(2, "msp", 2, **DEEPSEEK_MEMORY[3]),
    "deepseek 3, fsp 2, attention recomputed": layout(2, "fsp", 2, **DEEPSEEK_MEMORY[3], model__checkpoint="attention"),
    "deepseek 3, isp 2 x 2, bf16": layout(2, "isp", 2, 2, **DEEPSEEK_MEMORY[3], **BF16),
    "glm 4, mtp 2, attention recomputed": layout(2, "mtp", 2, model_type="GLM4", model__checkpoint="attention"),
    "experts": layout(1, **EXPERTS, model__moe_type="Dropless"),
    "experts with capacity, bf16, zero 2": layout(2, **EXPERTS, model__dtype="torch.bfloat16", parallel__expert={"size": 1}),
    "experts over 2 of 4 ranks, bf16": layout(4, **EXPERTS, model__dtype="torch.bfloat16", parallel__expert={"size": 2}),
    **{
        f"experts, {mode} 2{' whole' * no_tp}{', bf16' * bf16}": layout(
            2, mode, 2, **EXPERTS, **DROPLESS, **(BF16 if bf16 else {}), parallel__expert={"size": 1, "no_tp": no_tp}
        )
        for mode, no_tp, bf16 in [
            ("mtp", False, False),
            ("mtp", True, False),
            ("msp", False, True),
            ("msp", True, False),
            ("fsp", False, False),
            ("fsp", True, True),
            ("isp", False, False),
        ]
    },
    "experts, isp 2 x 2, expert weights over 2": layout(
        2, "isp", 2, 2, **EXPERTS, **DROPLESS, parallel__expert_weight={"size": 2}, parallel__expert={"size": 1}
    ),
    "experts, no shared one, first layer dense": layout(
        1,
        model_type="QWEN3MOE",
        model__num_experts=4,
        model__top_k=2,
        model__moe_intermediate_size=96,
        model__mlp_only_layers=[0],
    ),
}


ONE_MICRO_BATCH = {
    "one process, one micro-batch": layout(1),
    "zero 2, bf16, one micro-batch": layout(2, model__dtype="torch.bfloat16"),
    "fsdp, one micro-batch": layout(2, fsdp=True),
    "isp 2 x 2, one micro-batch": layout(2, "isp", 2, 2, weights={"overlap": True}),
}


MICRO_BATCHES = {
    "1F1B 4, bf16": 6,
    "1F1B 2, two micro-batches": 2,
    "interleaved 3 x 2, half recomputed": 6,
    "ZBH1 4": 6,
    "ZBV 3": 5,
}
"""Of a step, if there are not 4."""
PIPELINES = {
    "1F1B 4, bf16": pipelined(4, 4, layers=5, **BF16),
    "1F1B 2, zero 2, bf16": pipelined(4, 2, **BF16),
    "1F1B 2, fsdp": pipelined(4, 2, fsdp=True, **BF16),
    "1F1B 2, two micro-batches": pipelined(2, 2),
    "interleaved 2 x 3, msp 2": pipelined(4, 2, 3, mode="msp", tensor=2),
    "interleaved 3 x 2, half recomputed": pipelined(3, 3, 2, model__checkpoint=0.5),
    "interleaved 2 x 2, tied, fsp 2, recomputed": pipelined(
        4, 2, 2, mode="fsp", tensor=2, **RECOMPUTED, model_type="INTERNLM2", model__tie_word_embeddings=True
    ),
    "1F1B 2, isp 2 x 2, attention recomputed": pipelined(
        4, 2, mode="isp", tensor=2, weight=2, weights=PREFETCH, model__checkpoint="attention"
    ),
    "ZBH1 2, experts, mtp 2": scheduled(
        "ZBH1", pipelined(4, 2, layers=3, mode="mtp", tensor=2, **EXPERTS, **DROPLESS, parallel__expert={"size": 1})
    ),
    "ZBH1 2, experts, isp 2, expert weights over 2": scheduled(
        "ZBH1",
        pipelined(
            4,
            2,
            layers=3,
            mode="isp",
            tensor=2,
            **EXPERTS,
            **DROPLESS,
            parallel__expert_weight={"size": 2},
            parallel__expert={"size": 1},
        ),
    ),
    "1F1B 2, experts over 2 ranks": pipelined(
        4, 2, layers=3, **EXPERTS, model__moe_type="Dropless", parallel__expert={"size": 2}
    ),
    "1F1B 2, one stage without a rotary embedding": pipelined(2, 2, layers=2, **SMOLLM3),
    "1F1B 2, one stage without a rotary embedding, recomputed": pipelined(2, 2, layers=2, **SMOLLM3, **RECOMPUTED),
    "ZBH1 4": scheduled("ZBH1", pipelined(4, 4)),
    "ZBH1 2, zero 2, bf16": scheduled("ZBH1", pipelined(4, 2, **BF16)),
    "ZBH1 3, bf16, recomputed": scheduled("ZBH1", pipelined(3, 3, **RECOMPUTED, **BF16)),
    "ZBH1 2, mtp 2": scheduled("ZBH1", pipelined(4, 2, mode="mtp", tensor=2)),
    "ZBH1 2, isp 2 x 2, recomputed": scheduled(
        "ZBH1", pipelined(4, 2, mode="isp", tensor=2, weight=2, weights=PREFETCH, **RECOMPUTED)
    ),
    "ZBV 2, experts": scheduled("ZBV", pipelined(2, 2, 2, layers=4, **EXPERTS, model__moe_type="Dropless")),
    "ZBV 3": scheduled("ZBV", pipelined(3, 3, 2)),
    "ZBV 2, zero 2, bf16, tied": scheduled(
        "ZBV", pipelined(4, 2, 2, **BF16, model_type="INTERNLM2", model__tie_word_embeddings=True)
    ),
    "ZBV 2, bf16, tied": scheduled("ZBV", pipelined(2, 2, 2, **BF16, model_type="INTERNLM2", model__tie_word_embeddings=True)),
    "ZBV 2, msp 2, half recomputed": scheduled("ZBV", pipelined(4, 2, 2, mode="msp", tensor=2, model__checkpoint=0.5)),
    "ZBV 2, fsp 2": scheduled("ZBV", pipelined(4, 2, 2, mode="fsp", tensor=2)),
}


@pytest.mark.parametrize("name", [*CASES, *ONE_MICRO_BATCH, *PIPELINES])
def test_memory_is_that_of_the_formula(pool: Pool, tmp_path: Path, name: str) -> None:
    """On every rank; if experts are over ranks, the mean of the activations."""
    processes, changes = {**CASES, **ONE_MICRO_BATCH, **PIPELINES}[name]
    stages = changes.get("parallel__pipeline", {"size": 1})["size"]
    ranks = processes // (stages * changes["parallel__tensor"]["size"])
    rows = 2 if name in ONE_MICRO_BATCH else 2 * MICRO_BATCHES.get(name, 4) if name in PIPELINES else 4
    sizes = {"data__micro_bsz": 2, "data__global_batch_size": rows * ranks}
    path = write_config(tmp_path, write_dataset(tmp_path / "data"), "run", **{**SHAPE, **changes, **sizes})
    pool.train(path, processes)
    found = json.loads((tmp_path / "run" / "memory.json").read_text())["ranks"]
    assert len(found) == processes
    if changes.get("parallel__expert", {}).get("size", 1) > 1:  # how many rows a rank gets depends on the router
        for which in ("formula", "measured"):
            mean = sum(rank[which]["activations"] for rank in found) / processes
            for rank in found:
                rank[which]["activations"] = mean
    for rank in found:
        formula, measured = ({part: rank[which][part] for part in PARTS} for which in ("formula", "measured"))
        drops = changes.get("parallel__expert", {}).get("size", 1) > 1 and "model__moe_type" not in changes
        # Rows that experts on other ranks would drop do not travel.
        assert measured == pytest.approx(formula, rel=0.02) if drops else measured == formula


def test_the_console_shows_the_memory_of_every_stage(tmp_path: Path) -> None:
    processes, changes = pipelined(2, 2)
    more = {"monitor__memory": True, "data__total_steps": 1, "ckpt__enable_save_ckpt": False}
    path = write_config(tmp_path, write_dataset(tmp_path / "data"), "run", **{**changes, **more})
    lines = run("train", path, "--nproc", processes).stdout.splitlines()
    assert any(line.startswith("memory of rank 0, MB") for line in lines)
    assert any(line.startswith("total of rank 1") for line in lines)
