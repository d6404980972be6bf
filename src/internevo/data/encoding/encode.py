"""Jobs to ids, in worker processes or in this one: what tokenizing and streaming share."""

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

from ...errors import DataError, InternEvoError
from ...text.tokenizer import Tokenizer, load_tokenizer
from ..raw.documents import Document, read_documents
from ..raw.inputs import InputChunk
from .formats import FormatName, fields_of, make

OnError = Literal["stop", "skip"]
BATCH_BYTES = 4 << 20
"""Text given to the tokenizer at once: its working memory is many times that."""
LONGEST = 16 << 20
"""Characters of a document. The tokenizers library needs some 75 bytes for each, beside the text."""


@dataclass
class Encoded:
    """One chunk's documents: ids one after another, and each document's length."""

    ids: npt.NDArray[np.int32]
    """With signs."""
    counts: npt.NDArray[np.int32]
    size: int = 0
    """Bytes of input."""
    bad: list[str] = field(default_factory=list)
    """What was left out, and why."""


@dataclass(frozen=True)
class Encoder:
    """Reads a chunk's documents and makes ids of them."""

    tokenizer: Path
    format: FormatName = "text"
    key: str | None = None
    on_error: OnError = "stop"

    def __call__(self, chunk: InputChunk) -> Encoded:
        """
        Raises:
            DataError: with ``on_error = "stop"``, at the first document that cannot be read or has not what is wanted.
        """
        parts: list[npt.NDArray[np.int32]] = []
        bad: list[str] = []
        for batch in self._batches(chunk, bad):
            for made in make(self.format, batch, self.key, tokenizer_at(self.tokenizer)):
                if isinstance(made, DataError):
                    self._bad(made, bad)
                elif len(made):  # an empty document teaches nothing
                    parts.append(made)
        counts = np.array([len(part) for part in parts], np.int32)
        return Encoded(np.concatenate(parts) if parts else np.empty(0, np.int32), counts, chunk.size, bad)

    def _batches(self, chunk: InputChunk, bad: list[str]) -> Iterator[list[Document]]:
        batch: list[Document] = []
        size = 0
        for found in read_documents(chunk, fields_of(self.format, self.key)):
            if isinstance(found, DataError):
                self._bad(found, bad)
                continue
            values = found.value.values() if isinstance(found.value, dict) else [found.value]
            length = sum(len(str(value)) for value in values)
            if length > LONGEST:
                message = f"a document of {length:,} characters is more than a tokenizer can be given ({LONGEST:,}); cut it"
                self._bad(DataError(f"{found.where}: {message}"), bad)
                continue
            batch.append(found)
            size += length
            if size > BATCH_BYTES:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch

    def _bad(self, error: DataError, bad: list[str]) -> None:
        if self.on_error == "stop":
            raise error
        bad.append(str(error))


@cache
def tokenizer_at(path: Path) -> Tokenizer:
    """Loaded once in each process."""
    return load_tokenizer(path)


class Workers:
    """Processes that encode chunks; with none of them, this process does it. ``contextlib.closing`` ends them."""

    def __init__(self, encoder: Encoder, count: int) -> None:
        self.encoder, self.count = encoder, count
        self.pool: ProcessPoolExecutor | None = None

    def encode(self, chunks: Iterable[InputChunk]) -> Iterator[Encoded]:
        """What becomes of each chunk, in their order. A few chunks are taken ahead, not all: they may hold content.

        Raises:
            DataError: of a chunk; or when a worker died.
        """
        if not self.count:
            yield from map(self.encoder, chunks)
            return
        if self.pool is None:
            context = multiprocessing.get_context("forkserver")
            self.pool = ProcessPoolExecutor(self.count, context, initializer=_begin_work)
        under_way: deque[Future[Encoded]] = deque()
        try:
            for chunk in chunks:
                under_way.append(self.pool.submit(self.encoder, chunk))
                if len(under_way) > 2 * self.count:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        except BrokenProcessPool:
            raise InternEvoError(
                "a tokenizing process died (killed for want of memory?): use fewer (--workers, data.num_worker)"
            ) from None
        finally:
            for future in under_way:
                future.cancel()

    def close(self) -> None:
        """Ends the processes."""
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)
            self.pool = None


def _begin_work() -> None:
    """A worker has one core (the tokenizers library would take all), and ends with the process that started it."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
