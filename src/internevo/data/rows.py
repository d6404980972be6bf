"""Rows of ``seq_len`` tokens, made from documents: packed, or one document each.

Row ``i`` is a function of the dataset and ``seq_len`` alone. Packing lays all documents end to end in index order and cuts
every ``seq_len`` tokens: nothing is dropped, the last row is padded, and a document that goes over the end continues in
the next row (its last token here still predicts its first token there).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ..errors import DataError
from .tokenized.files import MASKED_ZERO, Ids
from .tokenized.index import Index

IGNORE = -100


@dataclass
class Row:
    """One row of S tokens."""

    tokens: Ids
    """[S]"""
    labels: Ids
    """[S]: the id to predict at each token, or -100."""
    borders: list[int]
    """Where documents begin, 0 first; padding counts as a document."""
    types: npt.NDArray[np.int16]
    """[S]: dataset type of each token."""


class Rows(Protocol):
    """A dataset as numbered rows."""

    seq_len: int
    types: list[str]

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Row: ...

    def fingerprint(self) -> str:
        """Changes when the rows do."""


def tokens_and_labels(raw: Ids) -> tuple[Ids, Ids]:
    """Ids as stored -> (tokens, labels if predicted): negative ids are masked, ``MASKED_ZERO`` is a masked 0."""
    masked = raw < 0
    if not masked.any():
        return raw, raw
    tokens = np.where(raw == MASKED_ZERO, 0, np.abs(raw))
    return tokens, np.where(masked, IGNORE, tokens)


def empty_row(seq_len: int) -> Row:
    """Padding alone."""
    return Row(np.zeros(seq_len, np.int64), np.full(seq_len, IGNORE), [0], np.zeros(seq_len, np.int16))


def make_row(
    raw: Ids, ends: npt.NDArray[np.int64], types: npt.NDArray[np.int16], seq_len: int, more: bool, borders: bool
) -> tuple[Row, Ids]:
    """A row of documents laid end to end, and the ids that it needs, without signs.

    Args:
        raw: ids with signs, and one behind the row's if ``more``.
        ends: [documents] where each ends in the row.
        types: [documents]
        more: the last document goes on in the next row.
        borders: the documents do not see each other.
    """
    tokens, targets = tokens_and_labels(raw)
    filled = len(raw) - more
    row = empty_row(seq_len)
    row.tokens[:filled] = tokens[:filled]
    row.labels[: len(targets) - 1] = targets[1:]
    row.labels[(ends[:-1] if more else ends) - 1] = IGNORE
    row.types[:filled] = np.repeat(types, np.diff(ends, prepend=0))
    if borders:
        row.borders += [int(end) for end in ends if end < seq_len]
    return row, tokens


class _IndexRows:
    """What both kinds of rows share."""

    def __init__(self, index: Index, seq_len: int, vocab_size: int) -> None:
        self.index, self.seq_len, self.vocab_size = index, seq_len, vocab_size
        self.types = index.types

    def fingerprint(self) -> str:
        return f"{self.index.fingerprint()}-{type(self).__name__}-{self.seq_len}"

    def _check(self, tokens: Ids, first_document: int) -> None:
        if tokens.size and int(tokens.max()) >= self.vocab_size:
            raise DataError(
                f"{self.index.location(first_document)} or a document after it in its row: token id {int(tokens.max())} is "
                f"outside the vocabulary of {self.vocab_size} (model.vocab_size)"
            )


class PackedRows(_IndexRows):
    """Documents end to end, cut every ``seq_len`` tokens."""

    def __init__(self, index: Index, seq_len: int, vocab_size: int, into_one: bool = False) -> None:
        """``into_one``: a row is one span of attention; tokens see the documents before theirs."""
        super().__init__(index, seq_len, vocab_size)
        self.into_one = into_one

    def __len__(self) -> int:
        return -(-self.index.tokens // self.seq_len)

    def __getitem__(self, number: int) -> Row:
        index, size = self.index, self.seq_len
        start, stop = number * size, min((number + 1) * size, index.tokens)
        first, last = (int(d) for d in np.searchsorted(index.ends, [start, stop - 1], side="right"))
        ends = np.minimum(index.ends[first : last + 1] - start, size)  # where the documents end in this row
        more = int(index.ends[last]) > stop  # the last document goes on in the next row
        raw = self._raw(first, last, start, stop + more)
        row, tokens = make_row(raw, ends, self._types(first, last), size, more, borders=not self.into_one)
        self._check(tokens, first)
        return row

    def _types(self, first: int, last: int) -> npt.NDArray[np.int16]:
        files = np.searchsorted(self.index.first, np.arange(first, last + 1), side="right") - 1
        return np.array(self.index.file_types, dtype=np.int16)[files]

    def _raw(self, first: int, last: int, start: int, stop: int) -> Ids:
        """Ids ``start`` to ``stop`` of all documents laid end to end; they lie in documents ``first`` to ``last``."""
        index = self.index
        begin = int(index.ends[first]) - int(index.documents[first, 1])
        pieces, document = [], first
        while document <= last:
            file = index.file(index.file_of(document))
            run = self._run(document, last, file.itemsize)
            a, b = max(start - begin, 0), min(stop - begin, int(index.ends[run]) - begin)
            if run == document:
                pieces.append(file.read(int(index.documents[document, 0]), a, b))
            else:
                offset = int(file.meta[int(index.documents[document, 0]), 0])
                part = file.bytes[offset + a * file.itemsize : offset + b * file.itemsize]
                pieces.append(part.view(file.dtype).astype(np.int64))
            begin, document = int(index.ends[run]), run + 1
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _run(self, document: int, last: int, itemsize: int) -> int:
        """The last document up to which the binary file holds all documents without a gap, so that one slice reads them."""
        index = self.index
        if not itemsize:
            return document
        last = min(last, int(index.first[index.file_of(document) + 1]) - 1)
        numbers = index.documents[document : last + 1, 0]
        gaps = np.flatnonzero(np.diff(numbers) != 1)
        return document + int(gaps[0]) if len(gaps) else last


class PaddedRows(_IndexRows):
    """One document per row, padded at the end; longer documents take several rows."""

    def __init__(self, index: Index, seq_len: int, vocab_size: int) -> None:
        super().__init__(index, seq_len, vocab_size)
        self.ends = np.cumsum(-(-index.documents[:, 1] // seq_len))

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, number: int) -> Row:
        document = int(np.searchsorted(self.ends, number, side="right"))
        before = int(self.ends[document - 1]) if document else 0
        start = (number - before) * self.seq_len
        raw = self.index.read(document, start, start + self.seq_len + 1)
        filled = min(len(raw), self.seq_len)
        kind = np.array([self.index.file_types[self.index.file_of(document)]], np.int16)
        row, tokens = make_row(raw, np.array([filled]), kind, self.seq_len, len(raw) > filled, borders=False)
        self._check(tokens, document)
        return row


class RandomRows:
    """Rows of made-up documents (runs 0, 1, 2, ... repeated), for trying a config without data."""

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
        borders = [0]
        if not self.fixed_length and self.seq_len > 1:
            borders += sorted({int(b) for b in draw.integers(1, self.seq_len, size=draw.integers(0, 8))})
        tokens = np.empty(self.seq_len, np.int64)
        for a, b in zip(borders, [*borders[1:], self.seq_len], strict=True):
            tokens[a:b] = np.arange(b - a) % draw.integers(2, min(self.vocab_size, 64) + 1)
        labels = np.r_[tokens[1:], IGNORE]
        labels[[b - 1 for b in borders[1:]]] = IGNORE
        return Row(tokens, labels, borders, np.zeros(self.seq_len, np.int16))

    def fingerprint(self) -> str:
        return f"random-{self.seed}-{self.seq_len}-{self.vocab_size}-{self.fixed_length}"


class ListedRows:
    """Rows in memory."""

    def __init__(self, rows: list[Row], types: list[str], seq_len: int) -> None:
        self.rows, self.types, self.seq_len = rows, types, seq_len

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Row:
        row = self.rows[number]
        return Row(row.tokens, row.labels.copy(), row.borders, row.types)  # a repeated row's labels are cleared by its user

    def fingerprint(self) -> str:
        """Of the ids."""
        return hashlib.sha256(b"".join(row.tokens.tobytes() for row in self.rows)).hexdigest()[:16]
