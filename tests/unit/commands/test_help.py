"""Help without odd brackets, the version, and completion by a real shell."""

import inspect
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import internevo
from internevo import cli
from internevo.commands.help import complete_override, completion_script

COMMANDS = [command.name or command.callback.__name__ for command in cli.app.registered_commands if command.callback]


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        cli.main([*arguments])
    assert not caught.value.code
    return capsys.readouterr().out


@pytest.mark.usefixtures("exits_in_process")
@pytest.mark.parametrize("command", COMMANDS)
def test_brackets_in_a_help_are_around_what_may_be_left_out(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, command, "--help")
    usage, rest = text.split("\n\n", 1)
    assert re.fullmatch(
        r"Usage: .* \[OPTIONS\]( [A-Z]+(\.\.\.)?| \[[A-Z]+\]| \[KEY\.PATH=VALUE\.\.\.\])*", " ".join(usage.split())
    )
    assert not re.search(r"[\[\]{}<>]", rest.partition("Example: ")[0])


@pytest.mark.usefixtures("exits_in_process")
def test_what_the_brackets_said_is_still_said(capsys: pytest.CaptureFixture[str]) -> None:
    tokenize, config = (" ".join(printed(capsys, name, "--help").split()) for name in ("tokenize", "config"))
    assert "--output FOLDER Folder for the tokenized data. (required)" in tokenize
    assert "(default: 0.0, 0 to 1)" in tokenize and "--on-error stop|skip" in tokenize
    assert "Processes per node, for the layout. (default: 8)" in config


@pytest.mark.usefixtures("exits_in_process")
@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_no_description_is_cut(width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))

    def joined(text: str) -> str:  # lines are broken at spaces and after hyphens
        return re.sub(r"\s", "", text)

    program = joined(printed(capsys, "--help").partition("Commands:")[2])
    for command in cli.app.registered_commands:
        if command.hidden:
            continue
        assert command.callback is not None
        name, doc = command.name or command.callback.__name__, command.callback.__doc__ or ""
        sentence = re.split(r"\.\s", doc + "\n")[0]
        assert joined(f"{name} {sentence}.") in program
        options = joined(printed(capsys, name, "--help"))
        for option in inspect.get_annotations(command.callback, eval_str=True).values():
            assert all(joined(about.help or "") in options for about in getattr(option, "__metadata__", ())), name


@pytest.mark.usefixtures("exits_in_process")
def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "--version")
    assert text.startswith(f"internevo {internevo.__version__} (torch 2.") and platform.python_version() in text


def test_config_keys_are_completed() -> None:
    assert list(complete_override("data.seq_l")) == ["data.seq_len="]
    assert list(complete_override("monitor.tensorb")) == ["monitor.tensorboard."]
    assert list(complete_override("monitor.tensorboard.q")) == ["monitor.tensorboard.queue_max_length="]
    assert "JOB_NAME=" in complete_override("") and not list(complete_override("data.seq_len.x")) + list(
        complete_override("no.x")
    )


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_there_is_a_script_for_each_shell(shell: str) -> None:
    assert "_INTERNEVO_COMPLETE" in completion_script(shell)  # type: ignore[arg-type]


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash_completes_commands_options_values_and_keys(tmp_path: Path) -> None:
    program = tmp_path / "internevo"
    program.write_text(f"#!{sys.executable}\nfrom internevo.cli import main\nmain()\n")
    program.chmod(0o755)
    script = f"""
        PATH={tmp_path}:$PATH
        {completion_script("bash")}
        compopt() {{ :; }}
        try() {{ COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _internevo_completion internevo; echo "${{COMPREPLY[*]}}"; }}
        try internevo tr; try internevo convert a b --to ""; try internevo train x.py --np; try internevo train x.py data.seq_
    """
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:-1] == ["train", "hf internevo peft gguf", "--nproc", "data.seq_len="]
