"""The measured memory of rank 0 is that of the formula, within 2 percent."""

import json
from pathlib import Path

import pytest

from tests.conftest import write_config, write_dataset
from tests.parallel.layouts import EXPERTS, layout
from tests.pool import Pool

SHAPE = {
    "model__num_layers": 3, "model__hidden_size": 128, "model__num_attention_heads": 8, "model__num_kv_attention_heads": 2,
    "model__intermediate_size": 320, "model__vocab_size": 512, "data__seq_len": 128, "data__total_steps": 1,
    "monitor__memory": True, "ckpt__enable_save_ckpt": False,
}  # fmt: skip
PARTS = ("masters", "moments", "state", "activations")
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
    "qwen3": layout(2, "fsp", 2, model_type="QWEN3"),
    "qwen3, isp": layout(2, "isp", 2, model_type="QWEN3"),
    "experts": layout(1, **EXPERTS, model__moe_type="Dropless"),
    "experts with capacity, bf16, zero 2": layout(2, **EXPERTS, model__dtype="torch.bfloat16", parallel__expert={"size": 1}),
    "experts over 2 of 4 ranks, bf16": layout(4, **EXPERTS, model__dtype="torch.bfloat16", parallel__expert={"size": 2}),
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


@pytest.mark.parametrize("name", [*CASES, *ONE_MICRO_BATCH])
def test_memory_is_that_of_the_formula(pool: Pool, tmp_path: Path, name: str) -> None:
    processes, changes = {**CASES, **ONE_MICRO_BATCH}[name]
    ranks = processes // changes["parallel__tensor"]["size"]
    sizes = {"data__micro_bsz": 2, "data__global_batch_size": (2 if name in ONE_MICRO_BATCH else 4) * ranks}
    path = write_config(tmp_path, write_dataset(tmp_path / "data"), "run", **{**SHAPE, **changes, **sizes})
    pool.train(path, processes)
    report = json.loads((tmp_path / "run" / "memory.json").read_text())
    formula, found = report["formula"], report["measured"]
    assert {part: found[part] for part in PARTS} == pytest.approx({part: formula[part] for part in PARTS}, rel=0.02, abs=1024)
