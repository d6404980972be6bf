"""A file of rows that is continued after stops and kills: every step is in it once, and no row is lost that should be kept."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internevo.observe.metrics import JsonLines, usable_rows


def read_rows(path: Path) -> list[dict[str, Any]]:
    return usable_rows(path, {})[0]


def row(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "loss": 1.5 / step, "name": "春\u2028\n", **more}


def write(path: Path, last_step: int, rows: list[dict[str, Any]]) -> None:
    """Writes the rows of a run that continues after ``last_step``."""
    lines = JsonLines(path, last_step)
    for one in rows:
        lines.write(one)
    lines.close()


@given(runs=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20), st.integers(0, 200)), max_size=6))
def test_every_step_is_in_the_file_once_after_any_kills(
    tmp_path_factory: pytest.TempPathFactory, runs: list[tuple[int, int, int]]
) -> None:
    """Each run continues from a checkpoint of an earlier step, takes some steps, and is killed, perhaps within a line."""
    path = tmp_path_factory.mktemp("metrics") / "metrics.jsonl"
    steps_in_file = 0
    for number, (back, steps, cut) in enumerate(runs):
        first = max(0, steps_in_file - back)
        write(path, first, [row(step, run=number) for step in range(first + 1, first + steps + 1)])
        content = path.read_bytes()
        lines = content.splitlines(keepends=True)
        missing = min(cut, len(lines[-1])) if lines and steps else 0
        path.write_bytes(content[: len(content) - missing])
        steps_in_file = first + steps - (missing > 1)  # a row that lacks only its newline is complete
    assert [one["step"] for one in read_rows(path)] == list(range(1, steps_in_file + 1))
    write(path, steps_in_file, [row(steps_in_file + 1)])
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == list(range(1, steps_in_file + 2))


def test_rows_after_the_step_are_removed_and_rows_before_it_stay_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = [row(1), row(2), {"step": 2, "valid_loss": 3.0}, row(3), {"step": 4, "valid_loss": 2.0}]
    write(path, 0, first)
    write(path, 2, [row(3, later=True)])
    assert read_rows(path) == [*first[:3], row(3, later=True)]
    assert read_rows(tmp_path / "metrics.jsonl.removed") == first[3:]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_new_run_in_an_old_folder_starts_an_empty_file_and_no_row_of_the_old_one_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 0, [row(1), row(2)])
    write(path, 0, [row(1, later=True)])
    write(path, 0, [])
    assert read_rows(path) == []
    assert read_rows(tmp_path / "metrics.jsonl.removed") == [row(1), row(2), row(1, later=True)]


def test_a_row_is_in_the_file_as_soon_as_it_is_written(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "metrics.jsonl", 0)
    for step in (1, 2, 3):
        lines.write(row(step))
        assert read_rows(tmp_path / "metrics.jsonl") == [row(n) for n in range(1, step + 1)]
    lines.close()


def test_a_missing_file_has_no_rows(tmp_path: Path) -> None:
    assert read_rows(tmp_path / "metrics.jsonl") == []
    write(tmp_path / "metrics.jsonl", 5, [])
    assert (tmp_path / "metrics.jsonl").read_text() == ""


NOT_ROWS = [
    b"\x00" * 30, b'{"step": 3, "loss', b"{}}", b'{"step": 3', b"\xff\xfe", b"[1]", b"3", b'{"epoch": 1}', b'{"step": "3"}',
    b'{"step": null}', b'{"step": true}', b"",
    b"[" * 100_000,
]  # fmt: skip


@pytest.mark.parametrize("line", NOT_ROWS)
@pytest.mark.parametrize("end", [b"", b"\n"])
def test_a_line_that_is_not_a_row_is_kept_apart_and_the_rows_after_it_stay(tmp_path: Path, line: bytes, end: bytes) -> None:
    path, removed = tmp_path / "metrics.jsonl", tmp_path / "metrics.jsonl.removed"
    write(path, 0, [row(1), row(2)])
    rows = path.read_bytes()
    path.write_bytes(rows + line + end)
    assert read_rows(path) == [row(1), row(2)]
    path.write_bytes(line + b"\n" + rows + line + end)
    write(path, 2, [row(3)])
    assert read_rows(path) == [row(1), row(2), row(3)]
    assert set(removed.read_bytes().splitlines()) == {line}
    json.loads(path.read_text().splitlines()[0])


def test_an_evaluation_before_the_first_step_is_kept_unless_the_run_starts_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for last, kept in ((0, [0]), (0, [0]), (1, [0, 1])):
        lines = JsonLines(path, last)
        if not last:
            lines.write({"step": 0, "valid_loss": 1.0})
            lines.write({"step": 1, "loss": 1.0})
        lines.close()
        assert [row["step"] for row in read_rows(path)] == ([0, 1] if not last else kept)
