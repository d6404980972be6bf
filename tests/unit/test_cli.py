"""The command line: whatever the input is, one message and exit code 2; and nothing that is printed can fail."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from internevo import cli
from internevo.commands import arguments
from tests.conftest import ROOT, Run

pytestmark = pytest.mark.usefixtures("exits_in_process")

COMMANDS = ["train", "config", "tokenize", "convert", "generate", "inspect", "report", "demo"]
MORE = {
    "tokenize": ["--output", "out", "--train-tokenizer", "bpe", "--vocab-size", "300"],
    "convert": ["out", "--to", "hf"],
    "generate": ["--prompt", "x"],
}
"""What a command needs besides its input."""


def fail(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Runs a command that must fail with exit code 2; returns its message."""
    with pytest.raises(SystemExit) as caught:
        cli.main([*arguments])
    message = capsys.readouterr().err
    assert caught.value.code == 2, message
    assert "rror: " in message and "Traceback" not in message and "--debug" not in message
    return message


def with_input(command: str, path: str) -> list[str]:
    return [command, *(["--config"] if command == "demo" else []), path, *MORE.get(command, [])]


def test_every_path_may_be_in_the_home_folder() -> None:
    """Every argument whose type has a path in it is read by one of two functions."""
    found = 0
    for command in cli.app.registered_commands:
        assert command.callback is not None
        for name, hint in get_type_hints(command.callback, include_extras=True).items():
            if "Path" in str(get_args(hint)[:1]):
                found += 1
                assert get_args(hint)[1].parser in (arguments.parse_path, arguments.parse_input), f"{command.callback}, {name}"
    assert found == 31


@pytest.mark.parametrize("command", COMMANDS)
def test_input_in_the_home_folder_that_is_missing(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert f"{tmp_path}/missing does not exist" in fail(capsys, *with_input(command, "~/missing"))
    assert "~unknown/x does not exist" in fail(capsys, *with_input(command, "~unknown/x"))
    assert not list(tmp_path.iterdir())


def test_the_original_command_line_reads_paths_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", "~/missing.py"])
    with pytest.raises(SystemExit) as caught:
        cli.train_py()
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"error: config file {tmp_path}/missing.py does not exist\n"


def test_profiling_measures_memory_and_times(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    calls = list[list[str]]()

    def train(path: Path, overrides: list[str], *rest: object, **more: object) -> int:
        calls.append(overrides)
        return 0

    monkeypatch.setattr("internevo.commands.train.train", train)
    monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(tmp_path / "a.json"), "--profiling", "--seed", "3"])
    for start in (cli.train_py, lambda: cli.main(["train", str(tmp_path / "a.json"), "seed=3", "--profiling"])):
        with pytest.raises(SystemExit) as caught:
            start()
        assert caught.value.code == 0
    assert calls == [["seed=3", "monitor.memory=true", "monitor.trace=true"]] * 2


def test_a_dry_run_computes_nothing_that_could_be_profiled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.json").write_text("{}")
    message = fail(capsys, "train", str(tmp_path / "a.json"), "--dry-run", "--world-size", "2", "--profiling")
    assert "no --nproc or --profiling" in message


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", ["folder", "binary", "empty", "fifo", "long", "nothing", "null"])
def test_input_of_a_wrong_kind(
    command: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "fifo")
    path = {"long": "x" * 5000, "nothing": "", "null": "a\0b"}.get(kind, kind)
    message = fail(capsys, *with_input(command, path))
    assert len(message) < 700
    assert sorted(p.name for p in tmp_path.iterdir()) == ["binary", "empty", "fifo", "folder"]


@pytest.mark.parametrize("command", COMMANDS)
def test_input_that_may_not_be_read(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """root may read everything, so the system's answer is replaced."""
    (tmp_path / "a.json").write_text("{}")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert fail(capsys, *with_input(command, str(tmp_path / "a.json"))) == f"error: {tmp_path}/a.json: Permission denied\n"


@pytest.mark.parametrize(
    "arguments", [["train"], ["trian"], ["train", "a.py", "--nproc", "0"], ["config", "--nope"], ["report"]]
)
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "Usage: " in fail(capsys, *arguments)


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([*command, "--help"])
    out = capsys.readouterr().out
    assert not caught.value.code and "Usage: " in out and ("Example: " in out or not command)


def test_an_error_of_the_system_names_its_file(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(error: Exception) -> None:
        raise error

    for error, message in (
        (OSError(28, "No space left on device", "/a/b"), "error: /a/b: No space left on device"),
        (ModuleNotFoundError("x", name="plotly"), "error: the Python package plotly is missing: pip install plotly"),
    ):
        monkeypatch.setattr("internevo.commands.config.show", lambda *_, error=error: broken(error))
        with pytest.raises(SystemExit) as caught:
            cli.main(["config", "a.py"])
        assert caught.value.code == 1 and message in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["ascii", "ascii:strict", "latin-1"])
def test_any_text_can_be_printed(run: Run, tmp_path: Path, encoding: str) -> None:
    path = tmp_path / "模型.json"
    path.write_text(json.dumps({"JOB_NAME": "模型", "nope": 1}))
    environment = {"LANG": "C", "PYTHONIOENCODING": encoding}
    assert "\\u6a21" in run("config", path, code=2, env=environment).stderr
    done = run("config", ROOT / "configs" / "demo.py", "JOB_NAME=模型", env=environment)
    assert json.loads(done.stdout)["JOB_NAME"] == "模型"


END = """
import atexit, sys
import {module}
from internevo import cli
atexit.register(print, "Python was shut down")
print("the last line", end="")
cli._exit(3)
"""


@pytest.mark.parametrize(("module", "rest"), [("internevo.parallel.world", ""), ("internevo.config", "Python was shut down\n")])
def test_a_rank_ends_without_shutting_python_down(module: str, rest: str) -> None:
    """Threads of process groups may still need Python then. Nothing that was printed is lost."""
    done = subprocess.run([sys.executable, "-c", END.format(module=module)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (3, f"the last line{rest}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "x"), "give either --prompt TEXT or --prompts FILE"),
        (("generate", "x", "--prompt", "a", "--prompts", "b"), "give either --prompt TEXT or --prompts FILE"),
        (("generate", "x", "--prompt", "a", "--output", "b.jsonl"), "--output belongs to --prompts"),
        (("generate", "nowhere", "--prompt", "a"), "model folder nowhere does not exist"),
        (("chat", "nowhere"), "model folder nowhere does not exist"),
        (("evaluate", "x"), "give --data FOLDER"),
        (("evaluate", "x", "--data", "d", "--fewshot", "2"), "belong to --tasks"),
        (("evaluate", "nowhere", "--data", "d", "--nproc", "1"), "model folder nowhere does not exist"),
    ],
)
def test_wrong_usage_of_a_model_is_named(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str) -> None:
    assert message in fail(capsys, *arguments)


def test_debug_is_passed_on_to_the_processes_of_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str | None] = []

    def train(*_: object) -> int:
        seen.append(os.environ.get(cli.DEBUG))
        return 0

    monkeypatch.setenv(cli.DEBUG, "")  # so that it is removed at the end, whatever the command sets
    monkeypatch.delenv(cli.DEBUG)
    monkeypatch.setattr("internevo.commands.train.train", train)
    for more in ([], ["--debug"]):
        with pytest.raises(SystemExit):
            cli.main(["train", str(ROOT / "configs" / "demo.py"), *more])
    assert seen == [None, "1"]


def test_a_process_of_a_command_with_debug_prints_tracebacks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(cli.DEBUG, "1")
    with pytest.raises(SystemExit):
        cli.main(["report", "/no/such"])
    assert "Traceback" in capsys.readouterr().err
