"""Tokenizes raw files: worker processes encode chunks of the input, and one process writes the results in order.

The output depends only on the input and the options: not on the number of workers, and not on whether the command was killed
and run again. Its progress is saved every few seconds, and the same command continues from there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from ...config.data import TEMPLATE_DATE, is_date
from ...errors import DataError, UsageError, expect
from ...storage.hub import model_folder
from ...storage.jsonfile import read_object, replace_json
from ...text.tokenizer import Tokenizer, load_tokenizer, tokenizer_fingerprint, train_bpe
from ...wording import counted
from ..raw.documents import read_documents
from ..raw.inputs import find_files, split_files
from ..tokenized.files import TokenWriter
from ..tokenized.index import UNFINISHED
from ..tokenized.origin import Origin
from .encode import Encoded, Encoder, EncoderPool, OnError
from .formats import FormatName, check_format, document_text, format_fields
from .output import Output
from .questions import Ending

PART_TOKENS = 2**30
"""The number of tokens after which a new output file is begun."""
SAVE_EVERY = 5.0
"""The time after which progress is saved again, in seconds."""


@dataclass
class TokenizeResult:
    """How much was written."""

    documents: int = 0
    """The number of training documents."""
    tokens: int = 0
    """The number of tokens in them."""
    valid_documents: int = 0
    valid_tokens: int = 0
    skipped: int = 0
    """The number of documents that could not be read and were skipped."""
    vocab_size: int = 0
    empty: int = 0
    """The number of documents that were left out because there is nothing to train on in them."""


@dataclass
class SavedProgress:
    """How far the command has come; it is saved in the file ``unfinished.json``."""

    options: dict[str, Any]
    """The options that decide what is written."""
    inputs: str
    """A hash of the input files and of the tokenizer."""
    chunks: int = 0
    """The number of input chunks that are done."""
    size: int = 0
    """The size of these chunks, in bytes of the input files."""
    result: TokenizeResult = field(default_factory=TokenizeResult)
    parts: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    """For "train" and "valid": the number of the output file that is being written, and the tokens and documents in it."""

    @classmethod
    def read(cls, work: Path) -> SavedProgress | None:
        """Reads what a killed command has saved; None if there is nothing that can be read."""
        try:
            return cls.from_values(read_object(work / UNFINISHED))
        except (OSError, UsageError, KeyError, TypeError, AttributeError):
            return None

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> SavedProgress:
        """Makes the progress from what ``asdict`` returned."""
        parts = {name: tuple(part) for name, part in values["parts"].items()}
        return cls(**{**values, "result": TokenizeResult(**values["result"]), "parts": parts})

    def write(self, work: Path) -> None:
        """Replaces the file at once, so that it is complete at every moment."""
        replace_json(work / UNFINISHED, asdict(self))

    @property
    def documents(self) -> int:
        """The number of documents that have been written."""
        return self.result.documents + self.result.valid_documents

    def same_command(self, other: SavedProgress) -> bool:
        """Returns whether both come from the same options, input and tokenizer."""
        return (self.options, self.inputs) == (other.options, other.inputs)


def tokenize(
    inputs: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    tokenizer: str | Path | None = None,
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
    template_date: str = TEMPLATE_DATE,
    progress: Callable[[int, int], None] = lambda done, total: None,
    status: Callable[[str], None] = lambda text: None,
) -> TokenizeResult:
    """Tokenizes files into ``output/dataset_type``; with ``valid_ratio``, into ``output/train/...`` and ``output/valid/...``.

    Args:
        inputs: files and folders.
        output: the folder for the tokenized data.
        tokenizer: a tokenizer file or folder, or the name of a model on the Hugging Face Hub. None: a tokenizer is trained and
            written to ``output``.
        train_vocab_size: the size of the vocabulary of the tokenizer to train.
        kind: the kind of the input files, a key of ``raw.inputs.SUFFIXES``; None: each file's suffix tells it.
        format: the format of the documents.
        text_key: the field that has the text or the messages; None: the usual fields.
        pattern: a glob for the names of files inside folders; None: the usual suffixes.
        exclude: names of folders that are not searched.
        valid_ratio: the share of the documents that are for validation, from 0 to 1.
        workers: the number of worker processes; None: as many as there are CPU cores.
        overwrite: remove tokenized data that is already in ``output``.
        on_error: stop at a document that cannot be read, or skip it.
        template_date: the date (YYYY-MM-DD) that a chat template takes for today.
        progress: is called with the bytes of input that are done, and the bytes of all input.
        status: is called with messages for the user.

    Raises:
        DataError: if a document cannot be read; the message says where it is. What was done before is kept, and the same
            command continues from there. Also if there is nothing to write in place of ``output``'s old data.
        UsageError: if ``output`` already contains other data, or an argument is wrong.
    """
    check_format(format)
    if not is_date(template_date):
        raise UsageError(f"template_date = {template_date!r} must be a date, as in {TEMPLATE_DATE} (--template-date)")
    expect(tokenizer, (str, Path, type(None)), "a tokenizer is given by a path or a name")
    if (tokenizer is None) == (train_vocab_size is None):
        raise UsageError("give either tokenizer, or train_vocab_size to train one")
    paths = [Path(path) for path in ([inputs] if isinstance(inputs, str | Path) else inputs)]
    output, tokenizer = Path(output), None if tokenizer is None else model_folder(tokenizer, weights=False)
    target = Output(output, dataset_type, splits=bool(valid_ratio))
    own = {(output / path).resolve() for path in target.own_files()}
    files = [file for file in find_files(paths, kind, pattern, exclude) if file[1].resolve() not in own]
    options = {
        "tokenizer": tokenizer and str(tokenizer), "vocab_size": train_vocab_size, "format": format, "text_key": text_key,
        "type": dataset_type, "valid_ratio": valid_ratio, **({"template_date": template_date} if format == "chat" else {}),
    }  # fmt: skip
    vocab_size = _open(tokenizer, format, status).vocab_size if tokenizer else 0
    started = SavedProgress(options, _hash(files, tokenizer), result=TokenizeResult(vocab_size=vocab_size))
    with target.lock(status):
        replaced = target.continue_replacing()
        if replaced and (done := SavedProgress.from_values(replaced)).same_command(started):
            return done.result
        target.check(overwrite, trains_tokenizer=tokenizer is None)
        saved = _resume_or_start(target, started, overwrite, status)
        if tokenizer is None:
            assert train_vocab_size is not None  # checked above
            tokenizer = target.new / "tokenizer.json"
            if not (saved.chunks and tokenizer.is_file()):
                status(f"training a byte-level BPE tokenizer of {train_vocab_size:,} entries")
                train_bpe(_texts(files, text_key, on_error), train_vocab_size, target.new)
            saved.result.vocab_size = _open(tokenizer, format, status).vocab_size
        encoder = Encoder(tokenizer.resolve(), format, text_key, on_error, today=template_date)
        _encode(files, encoder, workers, _Writers(target, saved, may_mask=format != "text"), progress, status)
        old = target.check(overwrite, trains_tokenizer=train_vocab_size is not None)
        if not saved.documents and (old or saved.result.skipped):
            (target.work / UNFINISHED).unlink()
            raise DataError("the input has no document that can be read and is not empty, so nothing was written")
        if train_vocab_size is None:
            folders = [path.as_posix() for path in target.targets.values() if (target.new / path).is_dir()]
            Origin.of(tokenizer, format, folders, template_date).write(target.new)
        target.replace(old, asdict(saved))
    return saved.result


def _open(path: Path, format: FormatName, status: Callable[[str], None]) -> Tokenizer:
    tokenizer = load_tokenizer(path)
    if tokenizer.eos_id is None:
        status(f"the tokenizer {path} names no end token (eos_token), so none is written after a document")
    if format == "chat" and (problem := Ending.usual(tokenizer).problem(tokenizer)):
        status(f"note: {problem}")
    return tokenizer


def _encode(
    files: list[tuple[str, Path]],
    encoder: Encoder,
    workers: int | None,
    writers: _Writers,
    progress: Callable[[int, int], None],
    status: Callable[[str], None],
) -> None:
    """Encodes the files, from where ``writers`` has come to, and writes them. See ``tokenize`` for the arguments."""
    saved, saved_at = writers.saved, time.monotonic()
    total = sum(path.stat().st_size for _, path in files)
    chunks = split_files(files)
    first = list(islice(chunks, saved.chunks, saved.chunks + 2))  # for a single chunk no process is started
    count = (workers or os.cpu_count() or 1) if len(first) > 1 else 0
    with closing(EncoderPool(encoder, count)) as pool:
        for encoded in pool.encode(chain(first, chunks)):
            for message in encoded.skipped:
                status(f"left out: {message}")
            writers.write(encoded)
            progress(saved.size, total)
            if time.monotonic() - saved_at > SAVE_EVERY:
                writers.save_progress()
                saved_at = time.monotonic()
    writers.close()


def _texts(files: list[tuple[str, Path]], key: str | None, on_error: OnError) -> Iterator[str]:
    """Yields the texts of all documents, to train a tokenizer on."""
    for chunk in split_files(files):
        for found in read_documents(chunk, format_fields("text", key)):
            text = found if isinstance(found, DataError) else document_text(found, key)
            if isinstance(text, str):
                yield text
            elif on_error == "stop":
                raise text


def is_valid(number: int, valid_ratio: float) -> bool:
    """Returns whether a document is for validation: about ``valid_ratio`` of them are, chosen by a hash of the number."""
    if not valid_ratio:
        return False
    return int.from_bytes(hashlib.blake2b(str(number).encode(), digest_size=8).digest(), "little") < int(valid_ratio * 2**64)


def valid_ratio_for(documents: int) -> float:
    """Returns a share of a number of documents for validation: a tenth, but no more than about 1000 of many, and at least one
    of a few."""
    if documents < 2:
        return 0.0
    ratios = (min(0.1, 1000 / documents), *(percent / 100 for percent in range(11, 100)))
    counts = {ratio: sum(is_valid(number, ratio) for number in range(min(documents, 1000))) for ratio in ratios}
    return next((ratio for ratio, count in counts.items() if 0 < count < documents), 0.0)


def _hash(files: list[tuple[str, Path]], tokenizer: Path | None) -> str:
    """Returns a hash of the names, sizes and times of the input files, and of the content of the tokenizer's files."""
    listing = [(kind, str(path), path.stat().st_size, path.stat().st_mtime_ns) for kind, path in files]
    return hashlib.sha256(json.dumps([listing, tokenizer and tokenizer_fingerprint(tokenizer)]).encode()).hexdigest()


def _resume_or_start(target: Output, started: SavedProgress, overwrite: bool, status: Callable[[str], None]) -> SavedProgress:
    """Returns the progress of the same command if it was killed before, else ``started``, and nothing is in ``target.new``.

    Raises:
        UsageError: if there is unfinished work of a command with other options, and ``overwrite`` is false.
    """
    saved = SavedProgress.read(target.work)
    if saved is not None and saved.same_command(started):
        status(f"continuing after {counted(saved.documents, 'document')}")
        return saved
    if saved is not None and saved.documents:
        changed = [f"{key} {value!r}" for key, value in saved.options.items() if value != started.options.get(key)]
        if changed and not overwrite:
            raise UsageError(
                f"{target.folder} has {counted(saved.documents, 'document')} of a command with {', '.join(changed)} "
                "that was stopped: give that command again to finish it, or --overwrite to start again"
            )
        status(f"starting again: {'the options have' if changed else 'the input or the tokenizer has'} changed")
    shutil.rmtree(target.new, ignore_errors=True)
    (target.work / UNFINISHED).unlink(missing_ok=True)
    return started


class _Writers:
    """Writes training and validation documents, each into files of about ``PART_TOKENS`` tokens, and saves the progress."""

    def __init__(self, target: Output, saved: SavedProgress, may_mask: bool) -> None:
        """Opens the files.

        Args:
            saved: the progress to continue from; it is updated.
            may_mask: documents may have masked tokens, whose negative ids need int32.
        """
        self.target, self.saved = target, saved
        self.valid_ratio = saved.options["valid_ratio"]
        self.vocab_size = None if may_mask else saved.result.vocab_size
        self.writers = {name: self._open(name, *part) for name, part in saved.parts.items()}

    def _open(self, name: str, part: int, tokens: int = 0, count: int = 0) -> tuple[int, TokenWriter]:
        path = self.target.new / self.target.targets[name] / f"part-{part:05d}.bin"
        return part, TokenWriter(path, self.vocab_size, tokens, count)

    def write(self, encoded: Encoded) -> None:
        """Writes the documents of one input chunk."""
        result, starts = self.saved.result, np.cumsum([0, *encoded.counts])
        number = self.saved.documents
        valid = np.array([is_valid(number + n, self.valid_ratio) for n in range(len(encoded.counts))], dtype=bool)
        for name, chosen in (("train", np.flatnonzero(~valid)), ("valid", np.flatnonzero(valid))):
            if not len(chosen):
                continue
            whole = len(chosen) == len(encoded.counts)
            ids = encoded.ids if whole else np.concatenate([encoded.ids[starts[n] : starts[n + 1]] for n in chosen])
            self._writer(name).write(ids, encoded.counts[chosen])
            if name == "valid":
                result.valid_documents += len(chosen)
                result.valid_tokens += len(ids)
            else:
                result.documents += len(chosen)
                result.tokens += len(ids)
        result.skipped += len(encoded.skipped)
        result.empty += encoded.empty
        self.saved.chunks += 1
        self.saved.size += encoded.size

    def _writer(self, name: str) -> TokenWriter:
        """Returns the writer of the current file of "train" or "valid", and begins a new file if that one is full."""
        number, writer = self.writers.get(name, (-1, None))
        if writer is not None and writer.tokens >= PART_TOKENS:
            writer.close()
            writer = None
        if writer is None:
            self.writers[name] = self._open(name, number + 1)
        return self.writers[name][1]

    def save_progress(self) -> None:
        """Makes sure that everything written is on the disk, and then saves the progress."""
        for _, writer in self.writers.values():
            writer.flush()
        self.saved.parts = {name: (part, writer.tokens, writer.documents) for name, (part, writer) in self.writers.items()}
        self.saved.write(self.target.work)

    def close(self) -> None:
        """Finishes all files."""
        self.save_progress()
        for _, writer in self.writers.values():
            writer.close()
