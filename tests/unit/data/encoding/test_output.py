"""The output folder of ``internevo tokenize``: nothing in it is lost, whatever goes wrong and whenever it is killed."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from internevo.commands.inspect import describe
from internevo.data.encoding import tokenize as module
from internevo.data.encoding.tokenize import TokenizeResult, tokenize
from internevo.data.raw import inputs
from internevo.data.tokenized.index import open_index
from internevo.errors import DataError, InternEvoError, UsageError
from internevo.storage.lock import FileLock
from internevo.text.tokenizer import load_tokenizer, train_bpe

TEXTS = [f"document {n} " * (n % 7 + 1) for n in range(40)]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    return train_bpe(TEXTS, 270, tmp_path / "tokenizer").parent


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def texts(folder: Path, tokenizer: Path) -> list[str]:
    index, found = open_index(folder), load_tokenizer(tokenizer)
    return [found.decode(index.read(n).tolist()[:-1]) for n in range(len(index))]


class Killed(BaseException):
    pass


WRONG: dict[str, dict[str, Any]] = {
    "tokenizer": dict(tokenizer=Path("/typo")),
    "column": dict(text_key="body"),
    "every document skipped": dict(text_key="body", on_error="skip"),
    "vocabulary": dict(tokenizer=None, train_vocab_size=3),
    "input": dict(inputs=[Path("/typo.jsonl")]),
    "type": dict(dataset_type="../en"),
    "pattern": dict(kind="parquet"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_command_that_fails_leaves_the_folder_as_it_was(tmp_path: Path, tokenizer: Path, source: Path, name: str) -> None:
    out = tmp_path / "out"
    tokenize([source], out, tokenizer=tokenizer, valid_ratio=0.2)
    for foreign in ("notes.tmp", "train/en/model.bin", "train/en/part-00000.bin.tmp", "weights/model.bin", "tokenizer.tmp"):
        (out / foreign).parent.mkdir(exist_ok=True)
        (out / foreign).write_text("mine")
    before = contents(out)
    options: dict[str, Any] = {"inputs": [source], "tokenizer": tokenizer, "overwrite": True, **WRONG[name]}
    with pytest.raises(InternEvoError):
        tokenize(options.pop("inputs"), out, **options)
    assert contents(out) == before and not (out / ".tokenizing").exists()


def test_overwriting_replaces_what_tokenize_has_written_and_nothing_else(tmp_path: Path, tokenizer: Path, source: Path) -> None:
    out = tmp_path / "out"
    tokenize([source], out, tokenizer=tokenizer, dataset_type="cn")
    mine = ["notes.tmp", "cn/x.bin", "cn/part-00000.bin.tmp", "en/a.counts.tmp", "weights/model.bin", ".internevo/notes"]
    for name in mine:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")
    with pytest.raises(UsageError, match=r"already contains tokenized data \(cn/part-00000\.bin\); give --overwrite"):
        tokenize([source], out, tokenizer=tokenizer)
    tokenize([source], out, tokenizer=tokenizer, valid_ratio=0.2, overwrite=True)
    assert sorted(contents(out)) == sorted(
        [
            *mine,
            "tokenized.json",
            *(f"{split}/en/part-00000.bin{suffix}" for split in ("train", "valid") for suffix in ("", ".meta")),
        ]
    )
    assert sorted(texts(out / "train", tokenizer) + texts(out / "valid", tokenizer)) == sorted(TEXTS)


@pytest.mark.parametrize(
    "name", ["en/part-00000.bin", "en/part-00003.bin.meta", "books/a.bin", "old/en/part-00000.bin", "a.bin"]
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_files_that_would_be_replaced_or_mixed_in_are_refused(
    tmp_path: Path, tokenizer: Path, source: Path, name: str, overwrite: bool
) -> None:
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    if "part" not in path.name or name.startswith("old"):
        path.with_name(path.name + ".meta").write_text("mine")
    with pytest.raises(UsageError, match=f"{name} was not written by `internevo tokenize`"):
        tokenize([source], tmp_path / "out", tokenizer=tokenizer, overwrite=overwrite)
    assert path.read_text() == "mine" and not (tmp_path / "out" / ".tokenizing").exists()


def test_a_tokenizer_of_somebody_else_is_not_replaced_and_a_trained_one_is(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "tokenizer.json").write_text("mine")
    with pytest.raises(UsageError, match=r"tokenizer\.json was not written by"):
        tokenize([source], out, train_vocab_size=270, overwrite=True)
    (out / "tokenizer.json").unlink()
    tokenize([source], out, train_vocab_size=270)
    with pytest.raises(UsageError, match="already contains tokenized data"):
        tokenize([source], out, train_vocab_size=280)
    assert tokenize([source], out, train_vocab_size=280, overwrite=True).vocab_size > 270
    assert texts(out, out) == TEXTS


def test_links_are_not_followed_to_files_that_would_be_replaced(tmp_path: Path, tokenizer: Path, source: Path) -> None:
    tokenize([source], tmp_path / "shared", tokenizer=tokenizer)
    before = contents(tmp_path / "shared")
    (tmp_path / "mix").mkdir()
    (tmp_path / "mix" / "en").symlink_to(tmp_path / "shared" / "en")
    with pytest.raises(UsageError, match="is reached over a link"):
        tokenize([source], tmp_path / "mix", tokenizer=tokenizer, dataset_type="cn", overwrite=True)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real").mkdir()
    tokenize([source], tmp_path / "link", tokenizer=tokenizer)
    assert contents(tmp_path / "real") == contents(tmp_path / "shared") == before


@pytest.mark.parametrize("where", ["in", "in/out", "."])
def test_the_output_may_be_in_the_input_folder_and_the_other_way_around(tmp_path: Path, source: Path, where: str) -> None:
    (tmp_path / "in").mkdir()
    source = source.rename(tmp_path / "in" / source.name)
    for _ in range(2):
        result = tokenize([tmp_path / "in"], tmp_path / where, train_vocab_size=270, overwrite=True)
        assert result.documents == len(TEXTS)
    assert source.is_file()


@pytest.mark.parametrize("name", ["out", "out/en"])
def test_an_output_that_is_a_file_is_refused(tmp_path: Path, tokenizer: Path, source: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(UsageError, match=f"{name} is a file, and must be a folder"):
        tokenize([source], tmp_path / "out", tokenizer=tokenizer, overwrite=True)


def test_a_second_command_on_the_same_folder_is_refused(tmp_path: Path, tokenizer: Path, source: Path) -> None:
    out = tmp_path / "out"
    (out / ".tokenizing").mkdir(parents=True)
    with (
        FileLock.acquire(out / ".tokenizing" / "lock", print),
        pytest.raises(UsageError, match=rf"out/\.tokenizing is in use by process {os.getpid()} on host .*, since "),
    ):
        tokenize([source], out, tokenizer=tokenizer, overwrite=True)
    tokenize([source], out, tokenizer=tokenizer)  # a lock file without a process is no obstacle
    assert texts(out, tokenizer) == TEXTS


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_command_that_is_killed_while_it_replaces_files_is_completed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Path, source: Path, overwrite: bool
) -> None:
    options: dict[str, Any] = dict(tokenizer=tokenizer, valid_ratio=0.2)
    expected = tokenize([source], tmp_path / "whole", **options)
    kills = 0
    for number in range(100):
        out = tmp_path / f"out{number}"
        if overwrite:
            tokenize([source], out, tokenizer=tokenizer)
        with monkeypatch.context() as patch:
            kill_at(patch, number)
            try:
                tokenize([source], out, **options, overwrite=overwrite)
            except Killed:
                kills += 1
        if (out / ".tokenizing" / "replacing.json").exists():
            with pytest.raises(DataError, match="is unfinished"):
                open_index(out)
        elif overwrite and not (out / "train").exists():
            assert texts(out, tokenizer) == TEXTS  # the old data is complete
        if kills == number:
            break
        assert tokenize([source], out, **options, overwrite=overwrite) == expected
        assert contents(out) == contents(tmp_path / "whole")
    assert kills > 8


def kill_at(patch: pytest.MonkeyPatch, number: int) -> None:
    """Raises ``Killed`` in place of the ``number``-th operation that renames or removes a file."""
    calls = iter(range(1000))
    for owner, name in ((os, "replace"), (Path, "replace"), (Path, "unlink")):
        original = getattr(owner, name)

        def operation(*args: Any, original: Any = original, **kwargs: Any) -> Any:
            if next(calls) == number:
                raise Killed
            return original(*args, **kwargs)

        patch.setattr(owner, name, operation)


class Stopped(BaseException):
    pass


def stop_early(source: Path, out: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """Leaves the first chunks of a command."""
    monkeypatch.setattr(inputs, "CHUNK_BYTES", 700)
    monkeypatch.setattr(module, "SAVE_EVERY", 0.0)

    def progress(done: int, total: int) -> None:
        if done > 1000:
            raise Stopped

    with pytest.raises(Stopped):
        tokenize([source], out, progress=progress, workers=1, **options)


@pytest.mark.parametrize("change", ["tokenizer", "input"])
def test_a_command_does_not_resume_with_another_tokenizer_or_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Path, source: Path, change: str
) -> None:
    stop_early(source, tmp_path / "out", monkeypatch, tokenizer=tokenizer)
    if change == "tokenizer":
        train_bpe(["something else"], 300, tokenizer)
    else:
        source.write_text(source.read_text() + '{"text": "more"}\n')
    said: list[str] = []
    tokenize([source], tmp_path / "out", tokenizer=tokenizer, status=said.append, workers=1)
    assert said == ["starting again: the input or the tokenizer has changed"]
    tokenize([source], tmp_path / "other", tokenizer=tokenizer, workers=1)
    assert contents(tmp_path / "out") == contents(tmp_path / "other")


def test_work_of_a_command_with_other_options_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Path, source: Path
) -> None:
    out = tmp_path / "out"
    stop_early(source, out, monkeypatch, tokenizer=tokenizer)
    with pytest.raises(DataError, match="is unfinished"):
        list(describe(out))
    with pytest.raises(UsageError, match=r"documents of a command with type 'en' that was stopped: give that command again"):
        tokenize([source], out, tokenizer=tokenizer, dataset_type="cn")
    said: list[str] = []
    tokenize([source], out, tokenizer=tokenizer, status=said.append, workers=1)
    assert said[0].startswith("continuing after") and texts(out, tokenizer) == TEXTS


@pytest.mark.parametrize("content", ["", "[]", "{", '{"parts": 3}', '{"parts": {}, "result": 1}'])
def test_progress_that_cannot_be_read_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: Path, source: Path, content: str
) -> None:
    stop_early(source, tmp_path / "out", monkeypatch, tokenizer=tokenizer)
    (tmp_path / "out" / ".tokenizing" / "unfinished.json").write_text(content)
    assert isinstance(tokenize([source], tmp_path / "out", tokenizer=tokenizer, workers=1), TokenizeResult)
    assert texts(tmp_path / "out", tokenizer) == TEXTS
