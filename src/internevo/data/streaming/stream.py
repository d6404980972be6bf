"""Rows cut from a streaming dataset's blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ...errors import DataError
from ..ahead import Ahead
from ..rows import Row, make_row
from ..source import Place, Taken
from .blocks import Block, Blocks, Position


class Stream:
    """A source of rows. A place is a block's position and the tokens of it that lie before."""

    def __init__(self, blocks: Blocks, seq_len: int, types: list[str], *, packed: bool, into_one: bool) -> None:
        """
        Args:
            packed: documents end to end, cut every ``seq_len`` tokens; otherwise each begins a row.
            into_one: a row is one span of attention; tokens see the documents before theirs.
        """
        self.blocks, self.seq_len, self.types = blocks, seq_len, types
        self.packed, self.into_one = packed, into_one
        self.source: Ahead[Block] | None = None
        self._clear()

    def _clear(self) -> None:
        self.begun: list[tuple[int, Position]] = []
        """Where blocks begin, counted from the first token in memory."""
        self.at, self.ended = 0, False
        self.ids, self.ends, self.kinds = np.empty(0, np.int32), np.empty(0, np.int64), np.empty(0, np.int16)
        self.bad: list[str] = []

    def fingerprint(self) -> str:
        """Of the files, the tokenizer and the cut."""
        return f"{self.blocks.fingerprint()}-{self.seq_len}-{self.packed}"

    def start(self) -> Place:
        """The first token of the first block."""
        return [Position().to_list(), 0]

    def take(self, place: Place, count: int, mine: Sequence[int]) -> Taken:
        """The next rows. Places other than the one behind the rows before are found by making their block anew."""
        if self.source is None or place != self._place():
            self._seek(place)
        wanted, rows, taken = set(mine), {}, 0
        while taken < count and (span := self._next()):
            if taken in wanted:
                rows[taken] = self._row(*span)
            taken += 1
        bad, self.bad = self.bad, []
        return Taken([rows[number] for number in mine if number in rows], taken, self._place(), bad)

    def after_change(self, place: Place) -> Place:
        """The next epoch, from its beginning: what of this one was seen cannot be told."""
        epoch = place[0][0] + 1 if isinstance(place, list) and isinstance(place[0], list) else 0
        return [Position(epoch).to_list(), 0]

    def close(self) -> None:
        """Ends the tokenizing in the background."""
        if self.source is not None:
            self.source.close()
            self.source = None

    def _seek(self, place: Place) -> None:
        self.close()
        self._clear()
        position, token = Position.of(place[0]), place[1]
        self.source = Ahead(self.blocks(position), 1, "blocks")
        self.begun = [(0, position)]
        self._fill(token)
        self.at = token

    def _place(self) -> Place:
        start, position = next(pair for pair in reversed(self.begun) if pair[0] <= self.at)
        return [position.to_list(), self.at - start]

    def _fill(self, tokens: int) -> None:
        """Has that many tokens behind ``at`` in memory, unless there are no more."""
        assert self.source is not None
        while len(self.ids) - self.at < tokens and not self.ended:
            block = next(self.source, None)
            if block is None:
                self.ended = True
                return
            first = int(np.searchsorted(self.ends, self.at, side="right"))  # the document that ``at`` is in
            kept = len(self.ids) - self.at
            self.begun = [(start - self.at, position) for start, position in self.begun] + [(kept, block.position)]
            self.ids = np.concatenate([self.ids[self.at :], block.ids])
            self.ends = np.concatenate([self.ends[first:] - self.at, block.ends + kept])
            self.kinds = np.concatenate([self.kinds[first:], block.types])
            self.bad += block.bad
            self.at = 0

    def _next(self) -> tuple[int, int, int] | None:
        """Goes over the next row. Returns where it is in memory, and its first document; None when there is none."""
        self._fill(self.seq_len)
        if self.at >= len(self.ids):
            return None
        first = int(np.searchsorted(self.ends, self.at, side="right"))
        end = len(self.ids) if self.packed else int(self.ends[first])
        start, self.at = self.at, min(self.at + self.seq_len, end)
        return start, self.at, first

    def _row(self, start: int, stop: int, first: int) -> Row:
        last = int(np.searchsorted(self.ends, stop - 1, side="right"))
        more = int(self.ends[last]) > stop  # the last document goes on in the next row
        ends = np.minimum(self.ends[first : last + 1], stop) - start
        raw = self.ids[start : stop + more].astype(np.int64)
        borders = self.packed and not self.into_one
        return make_row(raw, ends, self.kinds[first : last + 1], self.seq_len, more, borders)[0]


def all_rows(stream: Stream, limit: int | None) -> Iterator[Row]:
    """The rows of a stream that ends, for validation."""
    place, number = stream.start(), 0
    while limit is None or number < limit:
        taken = stream.take(place, 1, [0])
        if not taken.count:
            break
        if taken.bad:
            raise DataError(taken.bad[0])
        yield taken.rows[0]
        place, number = taken.place, number + 1
    stream.close()
