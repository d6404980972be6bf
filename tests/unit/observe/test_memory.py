"""The pictures of the memory of a step."""

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internevo.observe.memory import KINDS, draw_peak, draw_timeline, peaks_table
from internevo.observe.report import write_report
from internevo.observe.units import size

BYTES: dict[str, Any] = {**dict.fromkeys(KINDS, 0), "masters": 3000, "activations": 5000, "total": 8000}
PEAK: dict[str, Any] = {
    **BYTES, "measured": 8000, "slack": 0, "stages": [0, 3], "phase": "forward, stage 0, micro-batch 0",
    "operator": "aten::mm", "module": "layers.0.mlp",
}  # fmt: skip
GOOD: dict[str, Any] = {
    "rank": 2, "peak": PEAK,
    "phases": [{"name": "forward, stage 0, micro-batch 0", "events": 40, "alive": BYTES, "peak": BYTES},
               {"name": "<end>", "events": 60, "alive": BYTES, "peak": BYTES}],
    "modules": {"": {"activations": 500}, "layers.0.attn": {"masters": 1000, "activations": 3000},
                "layers.10.mlp.experts.gate.deep": {"masters": 2000, "activations": 1500}},
    "timeline": [[3, 0.0, 0, 3000, 0, 0, 0, 0, 0, 0, 0], [30, 0.1, 0, 3000, 0, 0, 0, 5000, 0, 0, 0],
                 [50, 0.2, 1, 3000, 0, 0, 0, 0, 0, 0, 0]],
}  # fmt: skip


def titles(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter() if element.tag.endswith("title")]


def test_the_sunburst_has_each_module_and_the_kinds_of_its_memory() -> None:
    found = titles(draw_peak(GOOD))
    assert {"layers: 7.5 kB", "layers.0: 4 kB", "layers.0.attn.activations: 3 kB", "no module.activations: 500 B"} <= {*found}
    assert "layers.10.mlp.experts.master weights: 2 kB" in found  # deeper modules are one
    assert "layers.0.attn.moments: 0 B" not in found


def test_the_timeline_has_the_kinds_and_the_phases() -> None:
    svg = draw_timeline(GOOD)
    assert titles(svg) == [
        "master weights", "activations", "forward, stage 0, micro-batch 0: 8 kB at its end, 8 kB at its peak",
        "<end>: 8 kB at its end, 8 kB at its peak",
    ]  # fmt: skip
    assert "the peak is 8 kB" in svg and "script" not in svg


def test_a_model_of_one_module_is_a_whole_ring() -> None:
    svg = draw_peak({**GOOD, "modules": {"head": {"weights": 10}}})
    assert titles(svg) == ["head: 10 B", "head.weights: 10 B"]


@pytest.mark.parametrize(("nbytes", "text"), [(0, "0 B"), (999, "999 B"), (1234567, "1.23 MB"), (2.5e12, "2,500 GB")])
def test_sizes_have_units(nbytes: float, text: str) -> None:
    assert size(nbytes) == text


def test_the_table_has_all_ranks_or_the_highest_of_each_stage() -> None:
    rows = [{"peak": {**PEAK, "measured": 100 + rank, "stages": [rank % 2]}} for rank in range(20)]
    assert peaks_table(rows[:16]).count("<tr>") == 17
    table = peaks_table(rows)
    assert table.count("<tr>") == 3 and "<td>18</td><td>0</td><td>118 B</td>" in table and "<td>119 B</td>" in table


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["F", "<b>", ""]),
    lambda inner: st.lists(inner, max_size=12) | st.dictionaries(st.sampled_from([*GOOD, *PEAK, "name", "events"]), inner),
    max_leaves=30,
)


@given(key=st.sampled_from(sorted(GOOD)), value=anything)
def test_a_damaged_file_is_refused_or_drawn_as_text(key: str, value: Any) -> None:
    for draw in (draw_peak, draw_timeline):
        try:
            svg = draw({**GOOD, key: value})
        except ValueError:
            continue
        ElementTree.fromstring(svg)


@pytest.mark.parametrize("damaged", ["memory.json", "memory/rank-1.json", "another run", ""])
def test_the_report_shows_the_rank_with_the_highest_peak(tmp_path: Path, damaged: str) -> None:
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "memory").mkdir()
    ranks = [{"peak": {**PEAK, "measured": 10}}, {"peak": PEAK}]
    (tmp_path / "memory.json").write_text(json.dumps({"ranks": ranks}))
    (tmp_path / "memory" / "rank-1.json").write_text(json.dumps({**GOOD, "rank": 1}))
    if damaged == "another run":  # which was killed before it had written memory.json
        (tmp_path / "memory" / "rank-1.json").write_text(json.dumps({**GOOD, "rank": 1, "peak": {**PEAK, "weights": 7}}))
    elif damaged:
        (tmp_path / damaged).write_text("{")
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert ("damaged, missing or of another run" in page) == bool(damaged)
    assert ("rank 1 at its peak" in page) == (not damaged)


def test_the_report_of_an_older_run_has_no_pictures(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "memory.json").write_text(json.dumps({"formula": {}, "measured": {}, "ranks": [{"formula": {}}]}))
    assert "Memory of a step" not in write_report(tmp_path).read_text(encoding="utf-8")
