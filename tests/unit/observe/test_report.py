"""The report and ``internevo inspect`` of run folders with missing, partial or damaged files."""

import json
import re
import shutil
from pathlib import Path

import pytest

from internevo.commands.inspect import describe
from internevo.errors import UsageError
from internevo.observe.page import HEAD
from internevo.observe.report import write_report
from internevo.wording import counted

GOOD = {"step": 1, "loss": 2.5, "consumed_tokens": 10, "tgs": 3.0, "tflops": 1.0, "memory_peak_max": 2**30, "skipped": False}
LINES = {
    "nothing": b"",
    "half": b'{"step": 2, "lo',
    "binary": bytes(range(256)),
    "others": b'[1]\n"x"\n3\nnull\n' + b"[" * 100_000,
    "wrong": b'{"step": "a", "loss": "b"}\n{"loss": 1.0}\n{"step": 1, "loss": 1.0}\n{"step": 1, "valid_loss": null}\n{}',
}


@pytest.mark.parametrize("kind", LINES)
@pytest.mark.parametrize("rows", [0, 1])
def test_what_can_be_read_is_reported(tmp_path: Path, kind: str, rows: int) -> None:
    good = (json.dumps(GOOD) + "\n").encode() * rows
    (tmp_path / "metrics.jsonl").write_bytes(LINES[kind] + b"\n" * bool(LINES[kind]) + good)
    (tmp_path / "samples.jsonl").write_bytes(LINES[kind] + b'\n{"step": 1, "prompt": "a \\ud83d", "text": "<b>"}\n')
    (tmp_path / "config.json").write_bytes(LINES[kind])
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert page.startswith(f"{HEAD}{tmp_path.name}</title>") and "a &#55357;</mark>&lt;b&gt;" in page
    assert ("No step has been trained yet" in page) == (not rows and kind != "wrong")
    assert (bool(re.search(r"Left out: \d damaged lines? of metrics.jsonl", page))) == (kind not in ("nothing", "wrong"))
    assert not rows or "<b>2.5000</b>last loss" in page
    lines = list(describe(tmp_path))
    assert lines[0] == f"run {tmp_path}: {counted(rows, 'step')}"
    assert any("damaged: " in line for line in lines) == (kind not in ("nothing", "wrong"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "metrics.jsonl", "report.html", "samples.jsonl"]


def test_a_run_folder_without_anything_has_a_report(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    assert "No step has been trained yet" in write_report(tmp_path).read_text(encoding="utf-8")
    assert write_report(tmp_path).is_file()  # it may be replaced


def test_the_current_folder_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("metrics.jsonl").touch()
    assert f"<h1>{tmp_path.name}</h1>" in write_report(Path(".")).read_text(encoding="utf-8")
    shutil.rmtree(tmp_path / "x", ignore_errors=True)
    Path("metrics.jsonl").unlink()
    with pytest.raises(UsageError, match="contains neither"):
        list(describe(Path(".")))


def test_a_page_that_is_no_report_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "report.html").write_text("<html>mine</html>")
    with pytest.raises(
        UsageError, match=r"report\.html exists and is not a report of internevo, so it is not replaced: rename it$"
    ):
        write_report(tmp_path)
    assert (tmp_path / "report.html").read_text() == "<html>mine</html>"
