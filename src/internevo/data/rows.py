"""Rows of ``seq_len`` tokens, made from documents: packed rows of several documents, or padded rows of one document each.

Row ``i`` depends only on the dataset and ``seq_len``. Packing concatenates all documents in the order of the index, and splits
the result into rows of ``seq_len`` tokens. Nothing is dropped, and the last row is padded. A document that goes past the end of
a row continues in the next row; its last token in this row predicts its first token in the next. ``WholeRows`` are packed
without splitting documents.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ..errors import DataError
from .tokenized.files import MASKED_ZERO, Ids
from .tokenized.index import Index

IGNORE = -100
"""The label of a token that predicts nothing; it is PyTorch's default ``ignore_index``."""


@dataclass
class Row:
    """One row of S = ``seq_len`` tokens."""

    tokens: Ids
    """[S]: the ids, 0 in the padding."""
    labels: Ids
    """[S]: the id to predict at each token, or -100."""
    document_starts: list[int]
    """Where each document begins in the row. The first value is 0; padding counts as a document."""
    types: npt.NDArray[np.int16]
    """[S]: the number of each token's dataset type."""


class Rows(Protocol):
    """A dataset of numbered rows (a map-style dataset)."""

    seq_len: int
    types: list[str]
    """The names of the dataset types; ``Row.types`` has their numbers."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Row: ...

    def fingerprint(self) -> str:
        """Returns a text that changes when the rows change."""


def tokens_and_labels(raw: Ids) -> tuple[Ids, Ids]:
    """Splits signed ids into tokens and labels.

    Returns:
        The ids without signs; and the same ids with -100 for masked tokens, as labels that are not shifted yet.
    """
    masked = raw < 0
    if not masked.any():
        return raw, raw
    tokens = np.where(raw == MASKED_ZERO, 0, np.abs(raw))
    return tokens, np.where(masked, IGNORE, tokens)


def empty_row(seq_len: int) -> Row:
    """Returns a row of padding."""
    return Row(np.zeros(seq_len, np.int64), np.full(seq_len, IGNORE), [0], np.zeros(seq_len, np.int16))


def make_row(
    raw: Ids, ends: npt.NDArray[np.int64], types: npt.NDArray[np.int16], seq_len: int, continues: bool, separate: bool
) -> tuple[Row, Ids]:
    """Makes a row from the concatenated documents in it.

    Args:
        raw: the signed ids of the row; if ``continues``, also the first id of the next row.
        ends: [documents]: where each document ends in the row.
        types: [documents]: the number of each document's dataset type.
        continues: the last document continues in the next row.
        separate: tokens do not attend to other documents.

    Returns:
        The row; and the ids in ``raw`` without signs.
    """
    tokens, targets = tokens_and_labels(raw)
    filled = len(raw) - continues
    row = empty_row(seq_len)
    row.tokens[:filled] = tokens[:filled]
    row.labels[: len(targets) - 1] = targets[1:]
    row.labels[(ends[:-1] if continues else ends) - 1] = IGNORE
    row.types[:filled] = np.repeat(types, np.diff(ends, prepend=0))
    if separate:
        row.document_starts += [int(end) for end in ends if end < seq_len]
    return row, tokens


class _IndexRows:
    """What packed and padded rows have in common."""

    def __init__(self, index: Index, seq_len: int, vocab_size: int) -> None:
        self.index, self.seq_len, self.vocab_size = index, seq_len, vocab_size
        self.types = index.types

    def fingerprint(self) -> str:
        """Returns a text that changes when the rows change."""
        return f"{self.index.fingerprint()}-{type(self).__name__}-{self.seq_len}"

    def _check_vocabulary(self, tokens: Ids, first_document: int) -> None:
        if tokens.size and int(tokens.max()) >= self.vocab_size:
            raise DataError(
                f"{self.index.location(first_document)} or a document after it in its row: token id {int(tokens.max())} is "
                f"outside the vocabulary of {self.vocab_size} (model.vocab_size)"
            )


class PackedRows(_IndexRows):
    """Rows of concatenated documents."""

    def __init__(self, index: Index, seq_len: int, vocab_size: int, into_one: bool = False) -> None:
        """Makes rows of the documents of ``index``.

        Args:
            into_one: each row is one span of attention: tokens attend to the documents before theirs in the row.
        """
        super().__init__(index, seq_len, vocab_size)
        self.into_one = into_one

    def __len__(self) -> int:
        return -(-self.index.tokens // self.seq_len)

    def __getitem__(self, number: int) -> Row:
        index = self.index
        start, stop = self._span(number)
        first, last = (int(d) for d in np.searchsorted(index.ends, [start, stop - 1], side="right"))
        ends = np.minimum(index.ends[first : last + 1] - start, stop - start)  # where the documents end in this row
        continues = int(index.ends[last]) > stop
        raw = self._read(first, last, start, stop + continues)
        row, tokens = make_row(raw, ends, self._types(first, last), self.seq_len, continues, separate=not self.into_one)
        self._check_vocabulary(tokens, first)
        return row

    def _span(self, number: int) -> tuple[int, int]:
        """Returns where a row begins and ends in the concatenation of all documents."""
        return number * self.seq_len, min((number + 1) * self.seq_len, self.index.tokens)

    def _types(self, first: int, last: int) -> npt.NDArray[np.int16]:
        """Returns the dataset types of documents ``first`` to ``last``, both included."""
        files = np.searchsorted(self.index.first, np.arange(first, last + 1), side="right") - 1
        return np.array(self.index.file_types, dtype=np.int16)[files]

    def _read(self, first: int, last: int, start: int, stop: int) -> Ids:
        """Returns the signed ids ``start`` to ``stop`` of all documents, concatenated, which are in ``first`` to ``last``."""
        index = self.index
        begin = int(index.ends[first]) - int(index.documents[first, 1])
        pieces, document = [], first
        while document <= last:
            file = index.file(index.file_of(document))
            until = self._last_contiguous(document, last, file.itemsize)
            a, b = max(start - begin, 0), min(stop - begin, int(index.ends[until]) - begin)
            if until == document:
                pieces.append(file.read(int(index.documents[document, 0]), a, b))
            else:
                offset = int(file.meta[int(index.documents[document, 0]), 0])
                part = file.bytes[offset + a * file.itemsize : offset + b * file.itemsize]
                pieces.append(part.view(file.dtype).astype(np.int64))
            begin, document = int(index.ends[until]), until + 1
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _last_contiguous(self, document: int, last: int, itemsize: int) -> int:
        """Returns the last document that can be read together with ``document`` as one slice of the file, up to ``last``.

        In the compact form these are the documents that follow each other in the same file; in JSON lines there are none.
        """
        index = self.index
        if not itemsize:
            return document
        last = min(last, int(index.first[index.file_of(document) + 1]) - 1)
        numbers = index.documents[document : last + 1, 0]
        gaps = np.flatnonzero(np.diff(numbers) != 1)
        return document + int(gaps[0]) if len(gaps) else last


class WholeRows(PackedRows):
    """Rows of whole documents: a document that does not fit into the rest of a row begins the next one; the rest is padding.

    Only documents that are longer than a row are split; such a document begins a row of its own.
    """

    def __init__(self, index: Index, seq_len: int, vocab_size: int, into_one: bool = False) -> None:
        super().__init__(index, seq_len, vocab_size, into_one)
        ends, starts, stops, start = index.ends, list[int](), list[int](), 0
        while start < index.tokens:
            last = int(np.searchsorted(ends, start + seq_len, side="right"))  # the first document that does not fit
            before = int(ends[last - 1]) if last else 0
            stop = before if before > start else min(start + seq_len, int(ends[last]))
            starts.append(start)
            stops.append(stop)
            start = stop
        self.starts, self.stops = np.array(starts, np.int64), np.array(stops, np.int64)

    def __len__(self) -> int:
        return len(self.starts)

    def _span(self, number: int) -> tuple[int, int]:
        return int(self.starts[number]), int(self.stops[number])


class PaddedRows(_IndexRows):
    """Rows of one document each, padded at the end. Documents longer than a row take several rows."""

    def __init__(self, index: Index, seq_len: int, vocab_size: int) -> None:
        super().__init__(index, seq_len, vocab_size)
        self.ends = np.cumsum(-(-index.documents[:, 1] // seq_len))  # [documents]: the cumulative sum of the rows of each

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, number: int) -> Row:
        document = int(np.searchsorted(self.ends, number, side="right"))
        before = int(self.ends[document - 1]) if document else 0
        start = (number - before) * self.seq_len
        raw = self.index.read(document, start, start + self.seq_len + 1)
        filled = min(len(raw), self.seq_len)
        type_ = np.array([self.index.file_types[self.index.file_of(document)]], np.int16)
        row, tokens = make_row(raw, np.array([filled]), type_, self.seq_len, len(raw) > filled, separate=False)
        self._check_vocabulary(tokens, document)
        return row


class RandomRows:
    """Rows of random documents (0, 1, 2, ... repeated with a random period), to try a config without data."""

    def __init__(self, seq_len: int, vocab_size: int, seed: int, fixed_length: bool = True, rows: int = 100_000) -> None:
        self.seq_len, self.vocab_size, self.seed, self.fixed_length, self.rows = (
            seq_len,
            vocab_size,
            seed,
            fixed_length,
            rows,
        )
        self.types = ["random"]

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, number: int) -> Row:
        draw = np.random.default_rng((self.seed, number))
        starts = [0]
        if not self.fixed_length and self.seq_len > 1:
            starts += sorted({int(b) for b in draw.integers(1, self.seq_len, size=draw.integers(0, 8))})
        tokens = np.empty(self.seq_len, np.int64)
        for a, b in zip(starts, [*starts[1:], self.seq_len], strict=True):
            tokens[a:b] = np.arange(b - a) % draw.integers(2, min(self.vocab_size, 64) + 1)
        labels = np.r_[tokens[1:], IGNORE]
        labels[[start - 1 for start in starts[1:]]] = IGNORE
        return Row(tokens, labels, starts, np.zeros(self.seq_len, np.int16))

    def fingerprint(self) -> str:
        """Returns a text that changes when the rows change."""
        return f"random-{self.seed}-{self.seq_len}-{self.vocab_size}-{self.fixed_length}"


class ReadableRows:
    """Rows in which those that cannot be read are replaced by empty ones."""

    def __init__(self, rows: Rows, report: Callable[[str], None] | None) -> None:
        """``report`` is called with a message when a row is replaced for the first time."""
        self.rows, self.report = rows, report
        self.seq_len, self.types, self.fingerprint = rows.seq_len, rows.types, rows.fingerprint
        self.replaced: set[int] = set()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Row:
        try:
            return self.rows[number]
        except DataError as error:
            if self.report is not None and number not in self.replaced:
                self.report(f"row {number}: {error}")
            self.replaced.add(number)
            return empty_row(self.seq_len)


class InMemoryRows:
    """Rows that are kept in memory."""

    def __init__(self, rows: list[Row], types: list[str], seq_len: int) -> None:
        self.rows, self.types, self.seq_len = rows, types, seq_len

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Row:
        row = self.rows[number]
        return Row(row.tokens, row.labels.copy(), row.document_starts, row.types)  # ``valid_batches`` overwrites labels

    def fingerprint(self) -> str:
        """Returns a hash of the ids."""
        return hashlib.sha256(b"".join(row.tokens.tobytes() for row in self.rows)).hexdigest()[:16]
