"""The console: a run goes on when it cannot be written any more."""

import io
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console as Terminal

from internevo.observe.console import Console, LogFile, log, start_log
from internevo.observe.record import StepRecord, ValidRecord

STEP = StepRecord(1, 2.0, 1.0, 0.1, 8, 8, 1.0, 1.0, None, 1.0, 0.0, 1, 1, False, 0.0)


class Broken(io.StringIO):
    """A file that takes one line."""

    def __init__(self, error: OSError) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        if self.tell():
            raise self.error
        return super().write(text)


@pytest.fixture
def log_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(log, "handlers", [])  # other tests may have left some
    start_log(tmp_path, 0)
    yield tmp_path / "rank-00000.log"
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), OSError(28, "No space left"), OSError(5, "I/O error")])
@pytest.mark.parametrize("live", [False, True])
def test_a_run_goes_on_without_its_console(log_file: Path, error: OSError, live: bool) -> None:
    console = Console(9, 1, Terminal(file=Broken(error), force_terminal=live, soft_wrap=True))
    console.begin(1)
    for number in range(3):
        console.say(f"line {number}")
        console.warn(f"warning {number}")
        console.step(STEP)
        console.valid(ValidRecord(1, 2.0, 3.0, 0.0))
    console.close()
    text = log_file.read_text()
    assert "the console cannot be written any more" in text and "line 2" in text and "warning 2" in text
    assert text.count("any more") == 1


def test_any_text_can_be_logged(log_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Not through the logger: pytest would keep the text, which its workers cannot hand on.
    handler = next(handler for handler in log.handlers if isinstance(handler, LogFile))
    handler.handle(logging.makeLogRecord({"msg": "a \ud83d b 模型", "levelno": logging.INFO}))
    assert "a \\ud83d b 模型" in log_file.read_text(encoding="utf-8")
    assert capsys.readouterr().err == "" and logging.raiseExceptions


def test_bars_and_lines_can_be_printed_in_ascii() -> None:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii", errors="backslashreplace")
    console = Console(9, 1, Terminal(file=file, force_terminal=True))
    console.say("模型")
    console.step(STEP)
    console.close()
    file.flush()
    assert b"\\u6a21" in raw.getvalue() and b"loss 2.0000" in raw.getvalue()
