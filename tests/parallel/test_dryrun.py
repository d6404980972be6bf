"""A dry run of a rank counts what this rank does in a real run, and what the strategies state: for random layouts."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from internevo.config import load_config
from internevo.planner.dryrun import dry_run
from tests.conftest import write_config
from tests.parallel.layouts import Composition, compositions
from tests.pool import Pool

DRAWN = int(os.environ.get("INTERNEVO_TEST_DRY_RUNS", "4"))
"""Number of random layouts."""
MICRO_BATCHES = 2


def layouts() -> list[Composition]:
    """Random layouts of 4 and 8 processes."""
    drawn = (next(compositions(seed)) for seed in range(1000, 1000 + 10 * DRAWN))
    return [one for one in drawn if one.processes >= 4][:DRAWN]


def real_run(pool: Pool, folder: Path, drawn: Composition) -> tuple[Path, list[dict[str, Any]], list[dict[str, Any]]]:
    """Trains two steps. Returns the config, the memory of all ranks, and the collectives of rank 0."""
    layout = drawn.layout
    data = drawn.processes // layout["parallel__tensor"]["size"] // layout["parallel__pipeline"]["size"]
    # One document in each row, as in a dry run, and one dataset type.
    sizes = {
        "data__micro_bsz": 1, "data__global_batch_size": 2 * MICRO_BATCHES * data, "data__total_steps": 2,
        "data__type": "mocked", "ckpt__enable_save_ckpt": False, "monitor__comm": True,
        "monitor__memory": "lora" not in str(drawn.changes),
    }  # fmt: skip
    path = write_config(folder, None, "run", **{**drawn.changes, **sizes})
    pool.train(path, drawn.processes)
    memory = folder / "run" / "memory.json"
    ranks = json.loads(memory.read_text())["ranks"] if memory.exists() else []
    return path, ranks, json.loads((folder / "run" / "comm.json").read_text())


def by_group(rows: list[Any]) -> dict[tuple[str, str], tuple[int, int]]:
    rows = [row if isinstance(row, dict) else asdict(row) for row in rows]
    return {(row["kind"], row["axis"]): (row["count"], row["nbytes"]) for row in rows}


@pytest.mark.parametrize("drawn", layouts(), ids=lambda drawn: f"{drawn.model}, {drawn.processes} ranks")
def test_a_dry_run_counts_what_a_real_run_does(pool: Pool, tmp_path: Path, drawn: Composition) -> None:
    path, memory, collectives = real_run(pool, tmp_path, drawn)
    config, last = load_config(path), drawn.processes - 1
    dry = {rank: dry_run(config, drawn.processes, rank) for rank in (0, last)}
    counted, real = by_group(dry[0].collectives), by_group(collectives)
    if dry[0].balanced:  # in a run, the router decides how many rows travel
        assert {key: count for key, (count, _) in counted.items()} == {key: count for key, (count, _) in real.items()}
        counted, real = ({k: v for k, v in rows.items() if k[0] != "all-to-all"} for rows in (counted, real))
    assert counted == real
    for found in dry.values():
        if (stated := found.stated_collectives) is not None:
            numbers, formula = by_group(found.collectives), by_group(stated)
            assert {key: count for key, (count, _) in numbers.items()} == {key: count for key, (count, _) in formula.items()}
            # Formulas state the largest shards, which rank 0 has.
            assert all(numbers[key] == formula[key] if found.rank == 0 else numbers[key] <= formula[key] for key in formula)
    for rank, found in dry.items() if memory else ():
        measured, parts = memory[rank]["measured"], asdict(found.memory)
        if found.balanced:
            assert parts.pop("activations") == pytest.approx(measured.pop("activations"), rel=0.2)
        assert json.loads(json.dumps(parts)) == measured
