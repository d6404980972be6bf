"""The rows of a streaming dataset, as a source."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ..prefetch import Prefetcher
from ..rows import Row, make_row
from ..source import AT_THE_BEGINNING, WHERE_IT_WAS, Continued, NextRows, Position, Saved
from .blocks import Block, BlockPosition, BlockReader


class Stream:
    """A source of rows, made from the documents of blocks. A position consists of a block and the number of a token in it."""

    def __init__(self, blocks: BlockReader, seq_len: int, types: list[str], *, packed: bool, into_one: bool) -> None:
        """Makes the source.

        Args:
            packed: documents are concatenated and split into rows; otherwise each document begins a new row, which is padded.
            into_one: each row is one span of attention: tokens attend to the documents before theirs in the row.
        """
        self.blocks, self.seq_len, self.types = blocks, seq_len, types
        self.packed, self.into_one = packed, into_one
        self.prefetcher: Prefetcher[Block] | None = None
        self._clear()

    def _clear(self) -> None:
        self.block_starts: list[tuple[int, BlockPosition]] = []
        """(number of its first token, position) of each block in memory; tokens are counted from the first one in ``ids``."""
        self.next_token = 0
        """The number of the token that the next row begins with."""
        self.exhausted = False
        """There are no more blocks."""
        self.ids, self.ends, self.doc_types = np.empty(0, np.int32), np.empty(0, np.int64), np.empty(0, np.int16)
        """The signed ids in memory; where each of their documents ends in them, and its dataset type."""
        self.skipped: list[str] = []

    def fingerprint(self) -> str:
        """Returns a text that changes when the files, the tokenizer or the way to make rows change."""
        return f"{self.blocks.fingerprint()}-{self.seq_len}-{self.packed}"

    def start_position(self) -> Position:
        """Returns the position of the first token of the first block."""
        return [BlockPosition().to_list(), 0]

    def next_rows(self, position: Position, count: int, needed: Sequence[int]) -> NextRows:
        """Returns the ``count`` rows after ``position``; see ``Source``.

        If ``position`` is not where the last call ended, its block is made again.
        """
        if self.prefetcher is None or position != self._position():
            self._seek(position)
        wanted, rows, number = set(needed), {}, 0
        while number < count and (span := self._next_span()):
            if number in wanted:
                rows[number] = self._row(*span)
            number += 1
        skipped, self.skipped = self.skipped, []
        return NextRows([rows[n] for n in needed if n in rows], number, self._position(), skipped)

    def shares_positions(self, fingerprint: str) -> bool:
        """Returns whether the blocks are the same. How rows are made of them does not matter to a position."""
        return fingerprint.rsplit("-", 2)[0] == self.blocks.fingerprint()

    def continue_from(self, saved: Saved) -> Continued:
        """Returns the same position in the same documents. In others it is the start of the next epoch, because it is not known
        which of them the run has seen."""
        if (same := saved.find(self.shares_positions)) is not None:
            return Continued(same.position, WHERE_IT_WAS)
        if isinstance(saved.position, list) and isinstance(saved.position[0], list):
            return Continued([BlockPosition(saved.position[0][0] + 1).to_list(), 0], "at the start of the next epoch")
        return Continued(self.start_position(), AT_THE_BEGINNING)

    def is_over(self, position: Position) -> bool:
        """Returns whether the epoch of ``position``, or the next one if it is not the start of an epoch, is after the last."""
        block, token = BlockPosition.from_list(position[0]), position[1]
        epoch = block.epoch + (block.block > 0 or token > 0)
        return self.blocks.epochs is not None and epoch >= self.blocks.epochs

    def close(self) -> None:
        """Ends the thread and the processes that tokenize."""
        if self.prefetcher is not None:
            self.prefetcher.close()
            self.prefetcher = None

    def _seek(self, position: Position) -> None:
        """Starts reading at a position."""
        self.close()
        self._clear()
        block, token = BlockPosition.from_list(position[0]), position[1]
        self.prefetcher = Prefetcher(self.blocks.iterate(block), 1, "blocks")
        self.block_starts = [(0, block)]
        self._load(token)
        self.next_token = token

    def _position(self) -> Position:
        """Returns the position of the next token."""
        start, block = next(pair for pair in reversed(self.block_starts) if pair[0] <= self.next_token)
        return [block.to_list(), self.next_token - start]

    def _load(self, tokens: int) -> None:
        """Loads blocks until there are ``tokens`` tokens from the next one on in memory, or no more blocks."""
        assert self.prefetcher is not None
        while len(self.ids) - self.next_token < tokens and not self.exhausted:
            block = next(self.prefetcher, None)
            if block is None:
                self.exhausted = True
                return
            first = int(np.searchsorted(self.ends, self.next_token, side="right"))  # the document of the next token
            kept = len(self.ids) - self.next_token
            self.block_starts = [*self._unfinished_blocks(), (kept, block.position)]
            self.ids = np.concatenate([self.ids[self.next_token :], block.ids])
            self.ends = np.concatenate([self.ends[first:] - self.next_token, block.ends + kept])
            self.doc_types = np.concatenate([self.doc_types[first:], block.types])
            self.skipped += block.skipped
            self.next_token = 0

    def _unfinished_blocks(self) -> list[tuple[int, BlockPosition]]:
        """Returns those of ``block_starts`` whose block has tokens from the next one on; starts are counted from that one."""
        ends = [start for start, _ in self.block_starts[1:]] + [len(self.ids)]
        return [
            (start - self.next_token, position)
            for (start, position), end in zip(self.block_starts, ends, strict=True)
            if end > max(start, self.next_token)
        ]

    def _next_span(self) -> tuple[int, int, int] | None:
        """Moves past the next row.

        Returns:
            Where the row starts and stops in ``ids``, and the number of its first document; None if there are no more rows.
        """
        self._load(self.seq_len)
        if self.next_token >= len(self.ids):
            return None
        first = int(np.searchsorted(self.ends, self.next_token, side="right"))
        end = len(self.ids) if self.packed else int(self.ends[first])
        start, self.next_token = self.next_token, min(self.next_token + self.seq_len, end)
        return start, self.next_token, first

    def _row(self, start: int, stop: int, first: int) -> Row:
        """Makes the row of a span that ``_next_span`` returned."""
        last = int(np.searchsorted(self.ends, stop - 1, side="right"))
        continues = int(self.ends[last]) > stop  # in the next row
        ends = np.minimum(self.ends[first : last + 1], stop) - start
        raw = self.ids[start : stop + continues].astype(np.int64)
        separate = self.packed and not self.into_one
        return make_row(raw, ends, self.doc_types[first : last + 1], self.seq_len, continues, separate)[0]


def all_rows(stream: Stream, limit: int | None, report: Callable[[str], None]) -> Iterator[Row]:
    """Yields the rows of a stream that ends, or the first ``limit`` of them; for validation.

    Args:
        report: is called with a message for each document that this rank has skipped.
    """
    position, number = stream.start_position(), 0
    while limit is None or number < limit:
        found = stream.next_rows(position, 1, [0])
        for message in found.skipped:
            report(message)
        if not found.count:
            break
        yield found.rows[0]
        position, number = found.position, number + 1
    stream.close()
