"""Tokenizes raw files into a tokenized dataset: workers take pieces of the input, one writer keeps their order.

The output depends on the input and the options, not on the number of workers, nor on whether the run was killed and started
again: every few seconds what is done is put on the disk and noted, and the same command goes on from there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import DataError, UsageError
from ...storage.jsonfile import read_object
from ...text.tokenizer import load_tokenizer, train_bpe
from ..raw.documents import read_documents
from ..raw.inputs import find_files, split_files
from ..tokenized.files import TokenWriter
from ..tokenized.index import UNFINISHED
from .encode import Encoded, Encoder, OnError, Workers
from .formats import FormatName, fields_of, text_of

PART_TOKENS = 2**30
"""Tokens in one output file."""
NOTE_EVERY = 5.0
"""Seconds between notes."""


@dataclass
class Result:
    """What a run made."""

    documents: int = 0
    tokens: int = 0
    valid_documents: int = 0
    valid_tokens: int = 0
    bad: int = 0
    """Documents left out."""
    vocab_size: int = 0


@dataclass
class Note:
    """How far a run has come."""

    key: str
    """Of the input and the options."""
    jobs: int = 0
    size: int = 0
    """Bytes of input."""
    result: Result = field(default_factory=Result)
    parts: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    """Of each open output: number of the part, its tokens and documents."""

    @classmethod
    def read(cls, output: Path) -> Note | None:
        """The note that an unfinished run has left."""
        if not (output / UNFINISHED).is_file():
            return None
        values = read_object(output / UNFINISHED)
        parts = {name: tuple(part) for name, part in values["parts"].items()}
        return cls(values["key"], values["jobs"], values["size"], Result(**values["result"]), parts)

    def write(self, output: Path) -> None:
        """Replaces the note, so that there is always a whole one."""
        temporary = output / f"{UNFINISHED}.tmp"
        temporary.write_text(json.dumps(asdict(self)))
        temporary.replace(output / UNFINISHED)


def tokenize(
    inputs: list[Path],
    output: Path,
    *,
    tokenizer: Path | None = None,
    train_vocab_size: int | None = None,
    kind: str | None = None,
    format: FormatName = "text",
    text_key: str | None = None,
    pattern: str | None = None,
    exclude: tuple[str, ...] = (),
    dataset_type: str = "en",
    valid_ratio: float = 0.0,
    workers: int | None = None,
    overwrite: bool = False,
    on_error: OnError = "stop",
    progress: Callable[[int, int], None] = lambda done, total: None,
    status: Callable[[str], None] = lambda text: None,
) -> Result:
    """Writes ``output/dataset_type`` (or ``output/train/...`` and ``output/valid/...`` with ``valid_ratio``).

    Args:
        tokenizer: a tokenizer file or folder; or else ``train_vocab_size``, which trains one into ``output``.
        on_error: stop at a document that cannot be read, or leave it out and say so.
        progress: called with bytes done and bytes in all.

    Raises:
        DataError: when a document cannot be read (named with its place). What was done before stays, out of sight of readers,
            for the same command to go on with.
    """
    files = find_files(inputs, kind, pattern, exclude)
    options = [str(tokenizer), train_vocab_size, format, text_key, dataset_type, valid_ratio]
    note = _begin(output, _key(files, options), overwrite, status)
    if tokenizer is None:
        assert train_vocab_size is not None
        tokenizer = output / "tokenizer.json"
        if not (note.jobs and tokenizer.is_file()):
            status(f"training a byte-level BPE tokenizer of {train_vocab_size:,} entries")
            train_bpe(_texts(files, text_key, on_error), train_vocab_size, output)
    note.result.vocab_size = load_tokenizer(tokenizer).vocab_size
    writers = _Writers(output, dataset_type, valid_ratio, note, masks=format != "text")
    total, noted = sum(path.stat().st_size for _, path in files), time.monotonic()
    chunks = split_files(files)
    first = list(islice(chunks, note.jobs, note.jobs + 2))  # a lone chunk needs no other process
    count = (workers or os.cpu_count() or 1) if len(first) > 1 else 0
    with closing(Workers(Encoder(tokenizer.resolve(), format, text_key, on_error), count)) as pool:
        for part in pool.encode(chain(first, chunks)):
            for message in part.bad:
                status(f"left out: {message}")
            writers.write(part)
            progress(note.size, total)
            if time.monotonic() - noted > NOTE_EVERY:
                writers.note()
                noted = time.monotonic()
    writers.close()
    (output / UNFINISHED).unlink()
    return note.result


def _texts(files: list[tuple[str, Path]], key: str | None, on_error: OnError) -> Iterator[str]:
    """All texts, for a tokenizer to be trained on."""
    for chunk in split_files(files):
        for found in read_documents(chunk, fields_of("text", key)):
            text = found if isinstance(found, DataError) else text_of(found, key)
            if isinstance(text, str):
                yield text
            elif on_error == "stop":
                raise text


def _key(files: list[tuple[str, Path]], options: list[Any]) -> str:
    """Changes with the input and what is asked for."""
    listing = [(kind, str(path), path.stat().st_size, path.stat().st_mtime_ns) for kind, path in files]
    return hashlib.sha256(json.dumps([listing, options]).encode()).hexdigest()


def _begin(output: Path, key: str, overwrite: bool, status: Callable[[str], None]) -> Note:
    """Where to begin: behind what the same command has done before, or anew. Refuses to mix new data with old."""
    note = Note.read(output)
    if note is not None and note.key == key and not overwrite:
        status(f"going on behind {note.result.documents + note.result.valid_documents:,} documents")
        return note
    old = list(output.glob("**/*.bin")) if output.is_dir() else []
    if old and not overwrite:
        raise UsageError(f"{output} holds tokenized data already ({old[0].name}, ...); give --overwrite or another --output")
    for path in [*old, *output.glob("**/*.tmp")]:
        path.unlink()
        path.with_name(path.name + ".meta").unlink(missing_ok=True)
    if output.is_dir():
        shutil.rmtree(output / ".internevo", ignore_errors=True)
    output.mkdir(parents=True, exist_ok=True)
    note = Note(key)
    note.write(output)
    return note


class _Writers:
    """The train and valid parts, each a row of files."""

    def __init__(self, output: Path, dataset_type: str, valid_ratio: float, note: Note, masks: bool) -> None:
        self.output, self._note = output, note
        self.folders = {"train": output / dataset_type, "valid": output / "valid" / dataset_type}
        if valid_ratio:
            self.folders["train"] = output / "train" / dataset_type
        self.threshold = int(valid_ratio * 2**64)
        self.vocab_size = None if masks else note.result.vocab_size
        self.open = {name: self._open(name, *part) for name, part in note.parts.items()}

    def _open(self, name: str, part: int, tokens: int = 0, count: int = 0) -> tuple[int, TokenWriter]:
        path = self.folders[name] / f"part-{part:05d}.bin"
        return part, TokenWriter(path, self.vocab_size, tokens, count)

    def write(self, part: Encoded) -> None:
        result, starts = self._note.result, np.cumsum([0, *part.counts])
        number = result.documents + result.valid_documents
        valid = np.array([self._is_valid(number + n) for n in range(len(part.counts))], dtype=bool)
        for name, chosen in (("train", np.flatnonzero(~valid)), ("valid", np.flatnonzero(valid))):
            if not len(chosen):
                continue
            whole = len(chosen) == len(part.counts)
            ids = part.ids if whole else np.concatenate([part.ids[starts[n] : starts[n + 1]] for n in chosen])
            self._writer(name).write(ids, part.counts[chosen])
            if name == "valid":
                result.valid_documents += len(chosen)
                result.valid_tokens += len(ids)
            else:
                result.documents += len(chosen)
                result.tokens += len(ids)
        result.bad += len(part.bad)
        self._note.jobs += 1
        self._note.size += part.size

    def _is_valid(self, number: int) -> bool:
        """A function of the document's number: about ``valid_ratio`` of all, spread evenly."""
        if not self.threshold:
            return False
        return int.from_bytes(hashlib.blake2b(str(number).encode(), digest_size=8).digest(), "little") < self.threshold

    def _writer(self, name: str) -> TokenWriter:
        number, writer = self.open.get(name, (-1, None))
        if writer is not None and writer.tokens >= PART_TOKENS:
            writer.close()
            writer = None
        if writer is None:
            self.open[name] = self._open(name, number + 1)
        return self.open[name][1]

    def note(self) -> None:
        """Puts what is written on the disk, and then notes it."""
        for _, writer in self.open.values():
            writer.flush()
        self._note.parts = {name: (part, writer.tokens, writer.documents) for name, (part, writer) in self.open.items()}
        self._note.write(self.output)

    def close(self) -> None:
        for _, writer in self.open.values():
            writer.close()
