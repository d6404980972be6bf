"""A strict reader can read all JSON that a run writes."""

import ast
import json
import math
from dataclasses import dataclass
from pathlib import Path

import pytest

import internevo
from internevo.errors import UsageError
from internevo.observe.metrics import JsonLines
from internevo.observe.record import StepRecord, ValidRecord
from internevo.storage.jsonfile import finite_json, read_object, to_json, write_json
from tests.strict_json import strict


def test_nan_and_infinity_become_null_at_any_depth(tmp_path: Path) -> None:
    values = {"a": [1, math.nan, {"b": (math.inf, 2.5)}], "c": {"d": {"e": -math.inf}}, "f": "NaN", "g": True, "h": None}
    wanted = {"a": [1, None, {"b": [None, 2.5]}], "c": {"d": {"e": None}}, "f": "NaN", "g": True, "h": None}
    assert strict(to_json(values)) == wanted
    write_json(tmp_path / "a.json", values, indent=1)
    assert strict((tmp_path / "a.json").read_text()) == wanted


def test_the_fast_writer_refuses_nan_and_infinity() -> None:
    @dataclass
    class Point:
        x: float

    assert strict(finite_json({"a": [Point(1.5)]})) == {"a": [{"x": 1.5}]}
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match="not JSON compliant"):
            finite_json([Point(bad)])


def test_rows_of_metrics_are_strict_json_also_those_from_earlier_versions(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "moe": {"entropy": NaN, "load": [0.5, Infinity]}}\n')
    rows = JsonLines(path, last_step=1)
    bad = math.nan
    step = StepRecord(
        step=2, loss=bad, grad_norm=math.inf, lr=0.1, tokens=1, consumed_tokens=1, tgs=1.0, tflops=1.0, mfu=None, step_time=1.0,
        data_time=0.0, memory_peak=1, memory_peak_max=1, skipped=True, time=1.0, loss_by_type={"en": bad},
        moe={"load": [0.5, bad], "entropy": bad},
    )  # fmt: skip
    rows.write(step.to_dict())
    rows.write(ValidRecord(2, bad, math.inf, 1.0, {"en": bad}, {"en": math.inf}).to_dict())
    rows.close()
    first, train, valid = map(strict, path.read_text().splitlines())
    assert first["moe"] == {"entropy": None, "load": [0.5, None]}
    assert train["loss"] is None
    assert train["loss_by_type"] == {"en": None}
    assert train["moe"] == {"load": [0.5, None], "entropy": None}
    assert valid["valid_loss"] is None
    assert valid["valid_ppl_by_type"] == {"en": None}


@pytest.mark.parametrize("room", ["checkpoint", "measure", "observe", "train"])
def test_files_of_a_run_are_written_only_by_the_strict_writer(room: str) -> None:
    paths = list((Path(internevo.__file__).parent / room).rglob("*.py"))
    assert paths
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "json":
                assert node.attr not in ("dump", "dumps"), f"{path.name}: storage.jsonfile writes JSON"


def test_an_object_is_read_and_what_is_not_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('\ufeff{"a": 1}', encoding="utf-8")  # with a byte order mark
    assert read_object(path) == {"a": 1}
    for text in ("", "[1]", "{", "[" * 200_000):
        path.write_text(text)
        with pytest.raises(UsageError, match=r"a\.json is"):
            read_object(path)


def test_the_strict_reader_is_strict() -> None:
    for text in ("NaN", '{"a": Infinity}', "[-Infinity]"):
        assert json.loads(text) is not None
        with pytest.raises(ValueError, match="not JSON"):
            strict(text)
