"""``internevo chat``: what the model sees of a talk, the commands, and Ctrl-C."""

import builtins
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import internevo
from internevo.commands import chat as command
from internevo.commands.generate import Options
from internevo.errors import UsageError
from internevo.models.config import DecoderConfig
from internevo.models.decoder import Decoder
from internevo.models.generate import Sampling
from internevo.text.tokenizer import train_bpe

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}[bot]{% endif %}"
)
OPTIONS = Options(8, Sampling(temperature=0.9), seed=1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = Decoder(DecoderConfig("LLAMA2", 300, 16, 32, 1, 2, 2, 8, max_position_embeddings=128))
    for weight in model.parameters():
        torch.nn.init.normal_(weight)
    train_bpe(["[user]the cat sat on the mat[bot]and purred[system]"] * 9, 300, tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text(TEMPLATE)
    internevo.save_hf(model, tmp_path / "model", tokenizer=tmp_path / "tokenizer")
    return tmp_path / "model"


def say(monkeypatch: pytest.MonkeyPatch, *lines: str | type[BaseException]) -> None:
    """Makes these lines the standard input; an exception is raised in place of a line."""
    rest: Iterator[str | type[BaseException]] = iter(lines)

    def read(_: str) -> str:
        line = next(rest, EOFError)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr(builtins, "input", read)


def test_an_answer_is_that_of_the_library_for_the_whole_talk(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    messages: list[dict[str, Any]] = [{"role": "system", "content": "Purr."}]
    wanted = []
    for number, question in enumerate(("the cat", "the mat")):
        messages.append({"role": "user", "content": question})
        options: dict[str, Any] = {"max_new_tokens": 8, "temperature": 0.9, "top_p": 1.0, "seed": 1 + number}
        wanted.append("".join(internevo.chat(folder, messages, **options)))
        messages.append({"role": "assistant", "content": wanted[-1]})
    say(monkeypatch, "the cat", "", KeyboardInterrupt, "the mat", "/reset", "the cat", "/what", "/exit", "never read")
    command.talk(folder, None, "Purr.", Options(8, Sampling(temperature=0.9), seed=1))
    out, err = capsys.readouterr()
    again = "".join(internevo.chat(folder, messages[:2], max_new_tokens=8, temperature=0.9, top_p=1.0, seed=3))
    assert out == "".join(f"{text}\n" for text in (*wanted, again)) and any(wanted)
    assert "the talk is forgotten" in err and "there is no command /what" in err


def test_ctrl_c_stops_an_answer_whose_beginning_stays(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[list[str]] = []

    def interrupted(model: object, messages: list[dict[str, str]], **_: object) -> Iterator[str]:
        seen.append([message["content"] for message in messages])
        yield "half an "
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "chat", interrupted)
    say(monkeypatch, "one", "two")
    command.talk(folder, None, None, OPTIONS)
    assert seen == [["one"], ["one", "half an ", "two"]] and capsys.readouterr().out == "half an \nhalf an \n"


def test_a_message_that_is_too_long_is_refused_and_forgotten(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    say(monkeypatch, "!" * 200, "the cat")
    command.talk(folder, None, None, OPTIONS)
    out, err = capsys.readouterr()
    assert "made for texts of up to 128" in err and "/reset" in err and out.count("\n") == 1


def test_a_model_without_a_chat_template_is_refused(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UsageError, match="has no chat template"):
        command.talk(folder, None, None, OPTIONS)
