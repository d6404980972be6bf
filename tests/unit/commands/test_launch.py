"""The processes of a command on this machine."""

import signal
from pathlib import Path

import pytest

from internevo.commands.launch import launch
from internevo.parallel.launcher import STOP_SIGNALS


@pytest.mark.parametrize(("arguments", "code"), [(["--version"], 0), (["no-such-command"], 2)])
def test_signals_are_this_process_own_again_after_its_processes_have_ended(
    tmp_path: Path, arguments: list[str], code: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """What a command does afterwards, as the export of ``finetune``, ends with Ctrl-C as usual."""
    numbers = (*STOP_SIGNALS, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    assert launch(arguments, 2, tmp_path / "log") == code
    assert [signal.getsignal(number) for number in numbers] == before
    printed = capfd.readouterr()
    assert printed.out.count("internevo") == 2 if code == 0 else "of 2 failed: exit code 2" in printed.err
