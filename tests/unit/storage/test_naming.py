"""A full disk: the error names the file that could not be written.

A limit of the file size is used instead of a full disk: with both, a write fails in the middle of a file.
"""

import logging
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from internevo.checkpoint.manifest import Manifest
from internevo.data.encoding.tokenize import tokenize
from internevo.data.tokenized.files import TokenWriter
from internevo.data.tokenized.index import open_index
from internevo.errors import InternEvoError
from internevo.observe.console import log, start_log
from internevo.observe.metrics import JsonLines
from internevo.observe.report import write_report
from internevo.storage.header import Spec
from internevo.storage.jsonfile import write_json
from internevo.storage.naming import naming
from internevo.storage.tensors import ShardWriter
from internevo.text.tokenizer import train_bpe
from tests.unit.data.writers import write_binary

LIMIT = 20_000


@contextmanager
def full_disk(limit: int = LIMIT) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def write_tokens(folder: Path) -> None:
    writer = TokenWriter(folder / "a.bin")
    writer.write(np.arange(LIMIT), np.array([LIMIT]))
    writer.close()


def write_meta(folder: Path) -> None:
    writer = TokenWriter(folder / "a.bin", 100)
    writer.write(np.ones(LIMIT // 10, np.int64), np.ones(LIMIT // 10, np.int64))
    writer.close()


def write_shards(folder: Path) -> None:
    with ShardWriter(folder, {"a": Spec((LIMIT,), torch.float32)}, 10**9, lambda number, count: "a.safetensors") as writer:
        writer.add(torch.zeros(LIMIT))


def write_rows(folder: Path) -> None:
    rows = JsonLines(folder / "metrics.jsonl", 0)
    for step in range(LIMIT):
        rows.write({"step": step})


WRITERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "json": (lambda folder: write_json(folder / "a.json", "x" * LIMIT), "a.json"),
    "tokens": (write_tokens, "a.bin"),
    "meta": (write_meta, "a.bin.meta"),
    "safetensors": (write_shards, "a.safetensors"),
    "metrics": (write_rows, "metrics.jsonl"),
    "report": (write_report, ".report.html."),
    "tokenizer": (lambda folder: train_bpe(["some text"], 2000, folder), "tokenizer.json"),
    "manifest": (lambda folder: Manifest(step=1, layout={}, versions={"a": "x" * LIMIT}).write(folder), ".manifest.json."),
}


@pytest.mark.parametrize("name", WRITERS)
def test_the_error_names_the_file(tmp_path: Path, name: str) -> None:
    write, file = WRITERS[name]
    with (
        full_disk(2000 if name == "tokenizer" else LIMIT),
        pytest.raises((OSError, InternEvoError), match=rf"{tmp_path}/{file}|{file}.*cannot be written"),
    ):
        write(tmp_path)


def test_an_error_that_names_its_file_is_left_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="missing"), naming(tmp_path / "other"):
        open(tmp_path / "missing")


def test_tokenize_names_the_file_and_continues_when_there_is_space(tmp_path: Path) -> None:
    tokenizer = train_bpe(["some text"], 270, tmp_path / "tokenizer")
    (tmp_path / "a.txt").write_text("some text " * 5000)
    with full_disk(), pytest.raises(OSError, match=r"out/\.tokenizing/data/en/part-00000\.bin"):
        tokenize([tmp_path / "a.txt"], tmp_path / "out", tokenizer=tokenizer)
    assert tokenize([tmp_path / "a.txt"], tmp_path / "out", tokenizer=tokenizer).documents == 1


def test_the_index_is_used_without_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_binary(tmp_path / "data" / "en" / "a.bin", [[1]] * 2000, 100)
    with full_disk():
        assert open_index(tmp_path / "data").tokens == 2000
    assert not list((tmp_path / "data" / ".internevo").iterdir())
    assert open_index(tmp_path / "data").tokens == 2000


def test_a_log_that_cannot_be_written_is_named_and_ends_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        with full_disk():
            start_log(tmp_path, 0, None)
            for _ in range(100):
                log.info("x" * 1000)
        assert capsys.readouterr().err.count("rank-00000.log cannot be written") == 1
    finally:
        for handler in list(log.handlers):
            log.removeHandler(handler)
            handler.close()
        log.propagate = True
        log.setLevel(logging.NOTSET)
