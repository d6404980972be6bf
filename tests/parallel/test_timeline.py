"""monitor.trace measures the timeline of a pipeline: every pass of every rank, and every message between them."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from internevo.observe.report import write_report
from internevo.parallel.orders import goes_to, needs, orders, rank_of
from tests.conftest import write_config
from tests.parallel.conftest import Runs
from tests.parallel.layouts import COMMON, Case, pipelined
from tests.pool import Pool

CASES: dict[str, tuple[str, int, int, Case]] = {
    "1F1B 2, fsdp 2": ("1F1B", 2, 1, pipelined(4, 2, fsdp=True)),
    "interleaved 2": ("1F1B", 2, 2, pipelined(2, 2, 2)),
    "ZBV 2, msp 2": ("ZBV", 2, 2, pipelined(4, 2, 2, mode="msp", tensor=2)),
}


@pytest.mark.parametrize("name", CASES)
def test_the_timeline_has_every_pass_and_every_message(pool: Pool, world: Runs, tmp_path: Path, name: str) -> None:
    _, dataset, _ = world
    mode, ranks, chunks, (processes, changes) = CASES[name]
    changes = {**COMMON, **changes, "monitor__trace": True, "data__total_steps": 3, "ckpt__enable_save_ckpt": False}
    changes["parallel__pipeline"] = {**changes["parallel__pipeline"], "mode": mode}
    pool.train(write_config(tmp_path, dataset, "run", **changes), processes)
    found: dict[str, Any] = json.loads((tmp_path / "run" / "timeline.json").read_text())
    all_orders = orders(mode, ranks, chunks, found["micro_batches"])
    for rank, (order, spans) in enumerate(zip(all_orders, found["ranks"], strict=True)):
        assert [tuple(span[:3]) for span in spans if span[0] in "FBW"] == order
        ends = [0.0, *(end for *_, end in spans)]
        assert all(before <= start <= end for before, (*_, start, end) in zip(ends[1:], spans[1:], strict=False))
        stages = ranks * chunks
        sent = [goes_to(a, stages) for a in order]
        needed = [needs(a, stages) for a in order]
        elsewhere = [rank_of(stage, ranks, mode) != rank for stage in sent if stage is not None]
        waits = [action for action in needed if action is not None and rank_of(action.stage, ranks, mode) != rank]
        assert len([span for span in spans if span[0] == "send"]) == sum(elsewhere) + 1  # and the end of all
        assert [tuple(span[1:3]) for span in spans if span[0] == "wait"] == [action[1:] for action in waits]
    assert 0 < found["idle"] < 1 and 0 < found["idle_played"] < 1
    assert "<h2>Pipeline</h2><svg" in write_report(tmp_path / "run").read_text()
    trace = json.loads(gzip.decompress((tmp_path / "run" / "trace-rank0.json.gz").read_bytes()))
    names = {event["name"] for event in trace["traceEvents"] if event.get("cat") == "user_annotation"}
    assert {"pipeline F stage 0 micro-batch 0", "pipeline send stage 0 micro-batch 0"} <= names
    assert "pipeline wait stage 1 micro-batch 0" in names and ("pipeline W stage 0 micro-batch 0" in names) == (mode == "ZBV")
