"""Rows for evaluation: every document is seen whole, if it fits into a row.

Training cuts the concatenated documents wherever a row ends. Here no document is cut unless it is longer than a row; then
several windows cover it. Windows are packed into rows so that little is padded, and tokens do not attend to other windows.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import DataError
from ..text.tokenizer import Tokenizer
from .rows import Row, empty_row, tokens_and_labels
from .tokenized.files import Ids
from .tokenized.index import Index

CONTEXT = 16
"""Number of tokens before a predicted span with which it is decoded."""


class Window(NamedTuple):
    """A part of a document that the model sees at once."""

    document: int
    start: int
    """The first token that it sees."""
    stop: int
    """The end of the tokens that it sees; the one there is the last that is predicted."""
    predicted: int
    """The first token that is predicted here. Those before it are predicted in the window before."""


class WholeDocuments:
    """Rows of whole documents."""

    def __init__(self, index: Index, documents: npt.NDArray[np.int64], seq_len: int, vocab_size: int, stride: int) -> None:
        """
        Args:
            documents: numbers of the documents to evaluate on.
            stride: number of tokens by which the windows of a document that is longer than a row are apart. If it is less than
                ``seq_len``, what is predicted in every window but the first has at least seq_len - stride tokens of context.
        """
        self.index, self.seq_len, self.vocab_size, self.stride = index, seq_len, vocab_size, stride
        self.types = index.types
        lengths = index.documents[:, 1]
        windows = [window for document in documents.tolist() for window in self._windows(document, int(lengths[document]))]
        self.rows = _pack(windows, seq_len)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Row:
        row, at = empty_row(self.seq_len), 0
        row.document_starts.clear()
        for document, start, stop, predicted in self.rows[number]:
            ids, labels = tokens_and_labels(self.index.read(document, start, stop + 1))
            if int(ids.max()) >= self.vocab_size:
                raise DataError(
                    f"{self.index.location(document)}: token id {int(ids.max())} is outside the model's vocabulary of "
                    f"{self.vocab_size}: the data was tokenized with another tokenizer"
                )
            end = at + stop - start
            row.document_starts.append(at)
            row.tokens[at:end] = ids[:-1]
            row.labels[at + predicted - start - 1 : end] = labels[predicted - start :]
            row.types[at:end] = self.index.file_types[self.index.file_of(document)]
            at = end
        if at < self.seq_len:
            row.document_starts.append(at)
        return row

    def fingerprint(self) -> str:
        """Returns a text that changes when the rows change."""
        return f"{self.index.fingerprint()}-{type(self).__name__}-{self.seq_len}-{self.stride}"

    def _windows(self, document: int, length: int) -> Iterator[Window]:
        """Yields the windows of a document. The last token predicts nothing, so no window needs to see it."""
        start, predicted = 0, 1
        while predicted < length:
            stop = min(start + self.seq_len, length - 1)
            yield Window(document, start, stop, predicted)
            start, predicted = start + self.stride, stop + 1


def _pack(windows: list[Window], seq_len: int) -> list[list[Window]]:
    """Puts windows into rows: the longest first, each into the row that it fills best (best fit, decreasing)."""
    rows: list[list[Window]] = []
    free: list[tuple[int, int]] = []  # (tokens that are free, number) of each row that is not full, in order
    for window in sorted(windows, key=lambda window: window.start - window.stop):
        size = window.stop - window.start
        place = bisect_left(free, (size, 0))
        space, row = free.pop(place) if place < len(free) else (seq_len, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(window)
        if space > size:
            insort(free, (space - size, row))
    return rows


def choose_documents(index: Index, limit: int | None) -> npt.NDArray[np.int64]:
    """Returns the numbers of the first ``limit`` documents of each dataset type; None: of all documents."""
    kinds = np.repeat(np.array(index.file_types, np.int64), np.diff(index.first))
    chosen = [np.flatnonzero(kinds == kind)[:limit] for kind in range(len(index.types))]
    return np.sort(np.concatenate(chosen))


def predicted_bytes(raw: Ids, tokenizer: Tokenizer) -> int:
    """Returns the number of bytes (UTF-8) of the text that is predicted in a document. The tokens that begin and end a document
    have none.

    Args:
        raw: the signed ids of the document.
    """
    ids, labels = tokens_and_labels(raw)
    predicted = labels >= 0
    predicted[:1] = False
    special = tokenizer.boundaries

    def size(start: int, stop: int) -> int:
        return len(tokenizer.decode([i for i in ids[start:stop].tolist() if i not in special]).encode(errors="replace"))

    boundaries = [0, *(np.flatnonzero(np.diff(predicted)) + 1).tolist(), len(ids)]
    spans = [(a, b) for a, b in pairwise(boundaries) if b > a and predicted[a]]
    return sum(size(max(0, a - CONTEXT), b) - size(max(0, a - CONTEXT), a) for a, b in spans)
