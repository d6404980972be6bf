"""The progress bar appears with the first progress."""

from pathlib import Path

import pytest

from internevo.commands.progress import progress_bar
from tests.conftest import Run


def test_the_bar_appears_with_the_first_progress(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("counting") as (progress, say):
        say("a line with [brackets]")
        assert "counting" not in capsys.readouterr().out.replace("a line with [brackets]", "")
        progress(1000, 1000)
        progress(1000, 1000)
    assert "counting" in (out := capsys.readouterr().out) and "1.0/1.0 kB" in out


@pytest.mark.parametrize("command", ["tokenize", "convert"])
def test_an_error_before_the_work_comes_without_a_bar(tmp_path: Path, run: Run, command: str) -> None:
    (tmp_path / "a.txt").write_text("x")
    arguments = {
        "tokenize": (tmp_path / "a.txt", "--tokenizer", "/typo", "--output", tmp_path / "out"),
        "convert": ("/typo", tmp_path / "out", "--to", "hf"),
    }[command]
    done = run(command, *arguments, code=2)
    assert done.stdout == "" and "/typo" in done.stderr
