"""``internevo generate``: what does not fit the model is refused by name, and only what the tokenizer knows is generated."""

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import internevo
from internevo import save_hf
from internevo.commands.generate import Options, complete_file, print_text, read_prompts
from internevo.errors import InternEvoError, UsageError
from internevo.inference.text import TextModel
from internevo.models.config import DecoderConfig, Rope
from internevo.models.decoder import Decoder
from internevo.models.generate import Continuation, Sampling, empty_caches, generate, longest_text
from internevo.text.tokenizer import load_tokenizer, train_bpe
from tests.conftest import Run

CONFIG = DecoderConfig("LLAMA2", 300, 16, 32, 1, 2, 2, 8, max_position_embeddings=64)
GREEDY = Sampling(temperature=0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Hugging Face folder of a tiny model with a vocabulary of 300, with a tokenizer of 280."""
    return model_in(tmp_path / "model", CONFIG)


def model_in(folder: Path, config: DecoderConfig) -> Path:
    torch.manual_seed(0)
    model = Decoder(config)
    for weight in model.parameters():
        torch.nn.init.normal_(weight)
    save_hf(model, folder)
    train_bpe(["the cat sat on the mat and purred"] * 9, 280, folder)
    return folder


def text(folder: Path, prompt: str, max_new_tokens: int, **options: Any) -> str:
    return "".join(internevo.generate(folder, prompt, max_new_tokens=max_new_tokens, **{"temperature": 0.0, **options}))


def test_a_prompt_beyond_the_models_positions_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="the prompt has 64 tokens, and the model is made for texts of up to 64"):
        internevo.generate(folder, "!" * 64, max_new_tokens=5)  # before a piece is asked for
    print_text(folder, None, "!" * 61, Options(5, GREEDY))
    out, err = capsys.readouterr()
    assert "note: the answer has at most 3 tokens" in err
    print_text(folder, None, "!" * 61, Options(3, GREEDY))
    assert capsys.readouterr() == (out, "") and out == "!" * 61 + text(folder, "!" * 61, 9) + "\n"


def test_the_scaling_of_the_rotary_embedding_makes_longer_texts_possible() -> None:
    yarn = Rope(kind="yarn", factor=4.0, options={"original_max_position_embeddings": 16})
    linear, dynamic = Rope(kind="linear", factor=4.0), Rope(kind="dynamic", factor=2.0)
    limits = [longest_text(replace(CONFIG, rope=rope)) for rope in (Rope(), yarn, linear, dynamic, None)]
    assert limits == [64, 64, 256, None, None]


def test_a_tokenizer_that_is_larger_than_the_model_is_refused(tmp_path: Path, folder: Path) -> None:
    other = train_bpe(["zebras zigzag zealously"] * 9, 330, tmp_path / "other")
    fast = load_tokenizer(other).backend
    assert fast.size() <= 330
    small = model_in(tmp_path / "small", replace(CONFIG, vocab_size=260))
    with pytest.raises(UsageError, match=r"the prompt has the token id \d+, but the model's vocabulary has 260 entries"):
        text(small, "zebras zigzag zealously", 5, tokenizer=other)


def test_only_ids_of_the_tokenizer_are_drawn(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    real = Continuation.step

    def watched(self: Continuation) -> list[tuple[int, int]]:
        new = real(self)
        drawn.extend(id_ for _, id_ in new)
        return new

    monkeypatch.setattr(Continuation, "step", watched)
    for seed in range(20):
        text(folder, "the", 20, temperature=100.0, seed=seed)
    assert len(drawn) > 200 and max(drawn) < load_tokenizer(folder).vocab_size <= 280


def test_generation_ends_at_the_ids_of_the_models_generation_config(folder: Path) -> None:
    tokenizer, longer = load_tokenizer(folder), text(folder, "the cat", 20)
    ids = generate(internevo.load_model(folder), tokenizer.with_bos("the cat"), 1, GREEDY)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [299, *ids]}))
    assert longer and text(folder, "the cat", 20) == ""


def test_bytes_that_are_not_utf8_are_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="the prompt is not UTF-8"):
        text(folder, "the \udcff", 5)


def test_pieces_are_yielded_as_they_come_and_end_at_a_stop_text(folder: Path) -> None:
    options: dict[str, Any] = {"temperature": 2.0, "seed": 3}
    whole = text(folder, "the cat", 30, **options)
    pieces = list(internevo.generate(folder, "the cat", max_new_tokens=30, **options))
    assert "".join(pieces) == whole and len(pieces) > 10
    stop = whole[7:9]
    assert text(folder, "the cat", 30, stop=[stop], **options) == whole[: whole.index(stop)]


def test_a_file_of_prompts_in_batches_gives_what_each_prompt_gives_alone(folder: Path, tmp_path: Path) -> None:
    prompts = ["the", "the cat sat on the mat and purred", "a", "", "purred and the cat"]
    source, output = tmp_path / "prompts.jsonl", tmp_path / "out" / "texts.jsonl"
    source.write_text("\n".join(json.dumps({"id": n, "prompt": prompt}) for n, prompt in enumerate(prompts)))
    complete_file(folder, None, source, output, 2, Options(12, Sampling(temperature=1.5), seed=7))
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["id"] for row in rows] == [0, 1, 2, 3, 4] and [row["prompt"] for row in rows] == prompts
    alone = [text(folder, prompt, 12, temperature=1.5, seed=7 + n) for n, prompt in enumerate(prompts)]
    assert [row["text"] for row in rows] == alone and len(set(alone)) > 3
    with pytest.raises(UsageError, match="is there already"):
        complete_file(folder, None, source, output, 2, Options(12, GREEDY))


def test_lines_of_other_files_are_prompts(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "prompts.txt"
    source.write_text("the cat\n\nthe mat\n")
    complete_file(folder, None, source, None, 8, Options(5, GREEDY))
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows == [{"prompt": prompt, "text": text(folder, prompt, 5)} for prompt in ("the cat", "the mat")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no prompt"),
        ('{"prompt": "a"}\n{', "line 2 is not JSON"),
        ('{"text": "a"}', 'line 1 has neither a "prompt"'),
        ('{"messages": []}', 'line 1 has neither a "prompt"'),
        ('{"prompt": "a"}\n{"prompt": "%s"}' % ("!" * 70), "line 2: the prompt has 70 tokens"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "line 1: .* has no chat template"),
    ],
)  # fmt: skip
def test_a_file_of_prompts_with_a_mistake_is_refused_by_line(folder: Path, tmp_path: Path, content: str, message: str) -> None:
    source = tmp_path / "prompts.jsonl"
    source.write_text(content)
    with pytest.raises(UsageError, match=message):
        complete_file(folder, None, source, tmp_path / "out.jsonl", 2, Options(5, GREEDY))
    assert not (tmp_path / "out.jsonl").exists()


def test_a_model_in_memory_needs_a_tokenizer() -> None:
    with pytest.raises(UsageError, match="give tokenizer="):
        internevo.generate(Decoder(CONFIG), "a")


def test_a_cache_that_does_not_fit_into_memory_is_named() -> None:
    with pytest.raises(InternEvoError, match="not enough memory to keep the keys and values of 1,152,921"):
        empty_caches(Decoder(CONFIG), 2**60, torch.float32, torch.device("cpu"))


@pytest.mark.parametrize(
    "options",
    [("--temperature", "nan"), ("--max-new-tokens", str(2**40)), ("--seed", str(2**64))],
    ids=" ".join,
)
def test_nonsense_is_wrong_usage(run: Run, tmp_path: Path, options: tuple[str, str]) -> None:
    done = run("generate", tmp_path, "--prompt", "a", *options, code=2)
    assert options[0].strip("-").replace("-", "_") in done.stderr.replace("-", "_") and "Traceback" not in done.stderr


def test_prompts_are_divided_at_the_ends_of_lines_only(tmp_path: Path) -> None:
    odd = "one\u2028two\x0bthree\x0cfour\x85five\rsix"
    (tmp_path / "p.txt").write_bytes(f"\ufeffa\r\n\n{odd}\n".encode())
    assert list(read_prompts(tmp_path / "p.txt", "text")) == [(0, {"prompt": "a"}), (2, {"prompt": odd})]
    row = {"prompt": odd, "id": 7}
    (tmp_path / "p.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n")
    assert list(read_prompts(tmp_path / "p.jsonl", "text")) == [(0, row)]


def test_an_output_is_there_when_it_is_complete_and_nothing_is_overwritten(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.txt").write_text("the cat\n" * 5)
    out, partial, real, calls = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial", TextModel.stream, [0]

    def interrupted(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] > stop:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(TextModel, "stream", interrupted)
    stop = 0
    with pytest.raises(KeyboardInterrupt):
        complete_file(folder, None, tmp_path / "p.txt", out, 2, Options(2, GREEDY))
    assert not out.exists() and not partial.exists() and not capsys.readouterr().err
    calls[0], stop = 0, 2
    with pytest.raises(KeyboardInterrupt):
        complete_file(folder, None, tmp_path / "p.txt", out, 2, Options(2, GREEDY))
    assert not out.exists() and len(partial.read_text().splitlines()) == 4
    assert f"{partial} has the texts of the first 4 prompts" in capsys.readouterr().err
    with pytest.raises(UsageError, match="out.jsonl.partial is there already; move it away"):
        complete_file(folder, None, tmp_path / "p.txt", out, 2, Options(2, GREEDY))
    partial.unlink()
    calls[0], stop = 0, 9
    complete_file(folder, None, tmp_path / "p.txt", out, 2, Options(2, GREEDY))
    assert len(out.read_text().splitlines()) == 5 and not partial.exists()
    with pytest.raises(UsageError, match="out.jsonl is there already"):
        complete_file(folder, None, tmp_path / "p.txt", out, 2, Options(2, GREEDY))
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="file/out.jsonl.partial cannot be written"):
        complete_file(folder, None, tmp_path / "p.txt", tmp_path / "file" / "out.jsonl", 2, Options(2, GREEDY))


@pytest.mark.parametrize("links", [True, False])
def test_an_output_that_appears_meanwhile_is_not_replaced(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    (tmp_path / "p.txt").write_text("the cat\n")
    out, real = tmp_path / "out.jsonl", TextModel.stream

    def refused(*arguments: object) -> None:
        raise PermissionError(errno.EPERM, "no links on this disk")

    if not links:
        monkeypatch.setattr(os, "link", refused)
    complete_file(folder, None, tmp_path / "p.txt", out, 2, Options(2, GREEDY))
    rows = out.read_text()
    out.unlink()

    def meanwhile(*arguments: Any) -> Any:
        out.write_text("mine")
        return real(*arguments)

    monkeypatch.setattr(TextModel, "stream", meanwhile)
    with pytest.raises(UsageError, match=r"out.jsonl is there already.*The texts are in .*out.jsonl.partial"):
        complete_file(folder, None, tmp_path / "p.txt", out, 2, Options(2, GREEDY))
    assert out.read_text() == "mine" and (tmp_path / "out.jsonl.partial").read_text() == rows


def test_a_text_ends_at_all_end_tokens_of_the_model(tmp_path: Path, folder: Path) -> None:
    """Those of generation_config.json, also if the tokenizer is in another folder."""
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 7]}))
    train_bpe(["the cat sat on the mat and purred"] * 9, 280, tmp_path / "other")
    assert TextModel.open(folder).eos_ids == TextModel.open(folder, tmp_path / "other").eos_ids == {5, 7}
    (tmp_path / "other" / "generation_config.json").write_text(json.dumps({"eos_token_id": 9}))
    assert TextModel.open(Decoder(CONFIG), tmp_path / "other").eos_ids == {9}
