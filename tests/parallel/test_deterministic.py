"""A run with deterministic algorithms has the same bits when it is repeated or resumed, also on GPUs."""

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import metrics, tensors, write_config, write_dataset
from tests.pool import DEVICE, Pool

STEPS = 4
DENSE: dict[str, Any] = {"model__checkpoint": 0.5}
EXPERTS: dict[str, Any] = {
    "model_type": "MIXTRALMOE", "model__num_experts": 4, "model__top_k": 2, "model__moe_type": "Dropless",
}  # fmt: skip
CAPPED: dict[str, Any] = {"model_type": "GEMMA2", "model__head_dim": 16}


MODELS = {"dense": DENSE, "experts": EXPERTS, "capped": CAPPED}
CASES = [("experts", "torch.float32")]
"""On a CPU, where the key changes nothing, one is enough."""
if DEVICE != "cpu":
    CASES = list(product(MODELS, ("torch.float32", "torch.bfloat16")))


@pytest.mark.parametrize(("model", "dtype"), CASES)
def test_a_run_that_is_repeated_or_resumed_has_the_same_bits(pool: Pool, tmp_path: Path, model: str, dtype: str) -> None:
    dataset = write_dataset(tmp_path / "data")
    changes = {
        **MODELS[model], "model__dtype": dtype, "model__vocab_size": 104, "data__total_steps": STEPS, "deterministic": True,
    }  # fmt: skip
    paths = {name: write_config(tmp_path, dataset, name, **changes) for name in ("once", "again", "resumed")}
    pool.train(paths["resumed"], 2, f"data.total_steps={STEPS // 2}")
    for path in paths.values():
        pool.train(path, 2)
    wanted, rows = tensors(tmp_path / "once", STEPS), metrics(tmp_path / "once")
    for name in ("again", "resumed"):
        for row, reference in zip(metrics(tmp_path / name), rows, strict=True):
            assert all(row[key] == reference[key] for key in ("step", "loss", "grad_norm", "lr", "loss_by_type")), (name, row)
        found = tensors(tmp_path / name, STEPS)
        assert all(torch.equal(found[key], wanted[key]) for key in wanted), name
