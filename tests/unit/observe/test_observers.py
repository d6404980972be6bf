"""What the observers write and say of a run from its start to its end."""

import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console as Terminal

from internevo.config.run import Monitor
from internevo.observe.background import Tracked
from internevo.observe.console import Console
from internevo.observe.observers import Observers, Progress
from internevo.observe.record import SaveRecord, ValidRecord
from tests.unit.observe.test_console import STEP


def observed(folder: Path, last_step: int = 0) -> Observers:
    folder.mkdir(exist_ok=True)
    console = Console(10, 1, Terminal(file=io.StringIO(), soft_wrap=True, width=80))
    return Observers(console, Monitor(), Tracked(folder, "job", "identity", last_step, {}), tensorboard=False)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_events_before_a_checkpoint_are_kept_when_a_run_resumes(tmp_path: Path) -> None:
    first = observed(tmp_path)
    first.start({"device": "cpu"})
    for step in (1, 2, 3):
        first.step(replace(STEP, step=step))
        first.saved(SaveRecord(step, tmp_path / f"step-{step}", 10, 1.0, step == 2, 1.0))
    first.close()
    again = observed(tmp_path, 2)
    again.start({"device": "cpu"})
    again.close()
    kept = [(row["event"], row["step"]) for row in rows(tmp_path / "events.jsonl")]
    assert kept == [("start", 0), ("save", 1), ("snapshot", 2), ("start", 2)]
    removed = [(row["event"], row["step"]) for row in rows(tmp_path / "events.jsonl.removed")]
    assert removed == [("save", 3), ("stop", 3)]


@pytest.mark.parametrize(
    ("step", "loss", "saved", "lines"),
    [
        (
            10,
            2.5,
            True,
            ["done: 10 of 10 steps", "loss 2.5000, validation loss 3.0000", "checkpoint: ", "the same command goes on"],
        ),
        (
            4,
            math.nan,
            True,
            ["stopped: 4 of 10 steps (2 of them since this start)", "no loss in", "checkpoint: ", "the same command goes on"],
        ),
        (10, 2.5, False, ["done: 10 of 10", "loss 2.5000", "no checkpoint (ckpt.enable_save_ckpt = False)"]),
    ],
)
def test_the_summary(tmp_path: Path, step: int, loss: float, saved: bool, lines: list[str]) -> None:
    observers = observed(tmp_path)
    observers.step(replace(STEP, step=step, loss=loss))
    observers.valid(ValidRecord(step, 3.0, 20.0, 1.0, {"en": 3.0}))
    if saved:
        observers.saved(SaveRecord(step, tmp_path / "new", 10, 1.0, False, 1.0))
    observers.summary(Progress(10, step if step == 10 else 2, 0, step == 10), 65.0, "the same command goes on")
    file = observers.console.terminal.file
    assert isinstance(file, io.StringIO)
    said = file.getvalue().splitlines()[-len(lines) :]
    assert all(part in line for part, line in zip(lines, said, strict=True)) and "in 1 min 5 s" in said[0]
    observers.close()
