"""Encodes input chunks to token ids, in worker processes or in this process. Tokenizing and streaming share it."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from ...config.data import TEMPLATE_DATE
from ...errors import DataError, InternEvoError
from ...text.tokenizer import Tokenizer, load_tokenizer
from ..raw.documents import Document, read_documents
from ..raw.inputs import InputChunk
from ..rows import tokens_and_labels
from .formats import FormatName, encode_documents, read_fields

OnError = Literal["stop", "skip"]
"""What to do with a document that cannot be read: raise its error, or skip it."""
BATCH_CHARACTERS = 4 << 20
"""The amount of text, in characters, that the tokenizer encodes at once. It needs many times as much memory."""
MAX_CHARACTERS = 16 << 20
"""The longest document, in characters. The tokenizers library needs about 75 bytes of memory for each of them."""


@dataclass
class Encoded:
    """The encoded documents of one input chunk."""

    ids: npt.NDArray[np.int32]
    """The signed ids of all documents, concatenated; a negative id is a masked token."""
    counts: npt.NDArray[np.int32]
    """[documents]: the number of tokens of each document."""
    size: int = 0
    """The size of the chunk, in bytes of the input files."""
    skipped: list[str] = field(default_factory=list)
    """For each document that was skipped: a message that says where it is and what is wrong with it."""
    empty: int = 0
    """The number of documents that were left out because there is nothing to train on in them."""


@dataclass(frozen=True)
class Encoder:
    """Reads the documents of an input chunk and encodes them."""

    tokenizer: Path
    format: FormatName = "text"
    key: str | None = None
    """The field that has the text or the messages; None: the usual fields."""
    on_error: OnError = "stop"
    vocab_size: int | None = None
    """The size of the model's vocabulary; every id is less. None: any id is right."""
    today: str = TEMPLATE_DATE
    """As in ``encode_documents``."""

    def __call__(self, chunk: InputChunk) -> Encoded:
        """Encodes a chunk.

        Raises:
            DataError: if ``on_error`` is "stop", for the first document that cannot be read or does not have the format.
        """
        parts: list[npt.NDArray[np.int32]] = []
        skipped, empty = list[str](), 0
        tokenizer = cached_tokenizer(self.tokenizer)
        may_be_outside = self.vocab_size is not None and tokenizer.vocab_size > self.vocab_size
        for batch in self._batches(chunk, skipped):
            encoded = encode_documents(self.format, batch, self.key, tokenizer, self.today)
            for document, ids in zip(batch, encoded, strict=True):
                if isinstance(ids, DataError):
                    self._skip(ids, skipped)
                elif may_be_outside and (outside := self._outside(document, ids)) is not None:
                    self._skip(outside, skipped)
                elif len(ids):
                    parts.append(ids)
                else:
                    empty += 1
        counts = np.array([len(part) for part in parts], np.int32)
        return Encoded(np.concatenate(parts) if parts else np.empty(0, np.int32), counts, chunk.size, skipped, empty)

    def _batches(self, chunk: InputChunk, skipped: list[str]) -> Iterator[list[Document]]:
        """Reads documents, and yields lists of them that have about ``BATCH_CHARACTERS`` characters."""
        batch: list[Document] = []
        size = 0
        for found in read_documents(chunk, read_fields(self.format, self.key)):
            if isinstance(found, DataError):
                self._skip(found, skipped)
                continue
            values = found.value.values() if isinstance(found.value, dict) else [found.value]
            try:
                length = sum(len(str(value)) for value in values)
            except RecursionError:
                self._skip(DataError(f"{found.where} has values that are nested too deep"), skipped)
                continue
            if length > MAX_CHARACTERS:
                limit = f"documents may have up to {MAX_CHARACTERS:,} characters"
                self._skip(DataError(f"{found.where} has {length:,} characters; {limit}: split it"), skipped)
                continue
            batch.append(found)
            size += length
            if size > BATCH_CHARACTERS:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch

    def _outside(self, document: Document, ids: npt.NDArray[np.int32]) -> DataError | None:
        """Returns an error if a document has an id that the model does not have."""
        largest = int(tokens_and_labels(ids.astype(np.int64))[0].max(initial=-1))
        if self.vocab_size is None or largest < self.vocab_size:
            return None
        outside = cached_tokenizer(self.tokenizer).describe_outside(largest, self.vocab_size)
        return DataError(f"{document.where} has {outside}")

    def _skip(self, error: DataError, skipped: list[str]) -> None:
        """Raises the error, or adds its message to ``skipped``."""
        if self.on_error == "stop":
            raise error
        skipped.append(str(error))


@cache
def cached_tokenizer(path: Path) -> Tokenizer:
    """Loads a tokenizer, once in each process."""
    return load_tokenizer(path)


class EncoderPool:
    """Worker processes that encode input chunks. Without workers, the calling process encodes them.

    ``close`` ends the processes.
    """

    def __init__(self, encoder: Encoder, num_workers: int) -> None:
        self.encoder, self.num_workers = encoder, num_workers
        self.pool: ProcessPoolExecutor | None = None

    def encode(self, chunks: Iterable[InputChunk]) -> Iterator[Encoded]:
        """Encodes chunks, and yields the results in the same order.

        Chunks are taken from ``chunks`` only a little ahead of the results: they may hold the content of a file in memory.

        Raises:
            DataError: see ``Encoder``.
            InternEvoError: if a worker process died.
        """
        if not self.num_workers:
            yield from map(self.encoder, chunks)
            return
        if self.pool is None:
            context = multiprocessing.get_context("forkserver")
            self.pool = ProcessPoolExecutor(self.num_workers, context, initializer=_init_worker)
        pending: deque[Future[Encoded]] = deque()
        try:
            for chunk in chunks:
                pending.append(self.pool.submit(self.encoder, chunk))
                if len(pending) > 2 * self.num_workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool:
            raise InternEvoError(
                "a worker process that tokenizes died, perhaps because there was not enough memory: use fewer workers "
                "(--workers, data.num_worker)"
            ) from None
        finally:
            for future in pending:
                future.cancel()

    def close(self) -> None:
        """Ends the worker processes."""
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)
            self.pool = None


def _init_worker() -> None:
    """Makes a worker use one core (the tokenizers library would use all), and end when the process that started it ends."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    assert parent is not None

    def exit_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()
