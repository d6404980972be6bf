"""The config that ``internevo plan --out`` writes can be trained, fits the memory asked for, and trains the same model."""

import json
from pathlib import Path

from internevo.commands.plan import Question, plan
from internevo.train.config import load_config
from tests.conftest import WriteConfig
from tests.parallel.conftest import assert_same_rows
from tests.pool import Pool

LIMIT = 1_100_000
"""Bytes of a rank: less than data parallel needs, whatever it recomputes and shards."""


def test_a_planned_layout_trains_the_same_model(pool: Pool, config: WriteConfig, tmp_path: Path) -> None:
    changes = {
        "data__global_batch_size": 8, "data__total_steps": 2, "model__num_layers": 8, "model__hidden_size": 64,
        "monitor__memory": True,
    }  # fmt: skip
    one, planned = config(name="one", **changes), tmp_path / "planned.yaml"
    plan(one, [], Question(4, "h100", memory=LIMIT, out=planned))
    parallel = load_config(planned).parallel
    assert parallel.pipeline.size * parallel.tensor.size * parallel.weight.size > 1
    pool.train(one)
    pool.train(planned, 4, f"ckpt.save_ckpt_folder={tmp_path / 'four'}")
    assert_same_rows(tmp_path / "four", tmp_path / "one", 2)
    ranks = json.loads((tmp_path / "four" / "memory.json").read_text())["ranks"]
    assert max(rank["peak"]["total"] for rank in ranks) <= LIMIT
