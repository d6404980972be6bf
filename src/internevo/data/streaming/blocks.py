"""A streaming dataset as blocks: a bounded number of documents, tokenized by all ranks together and shuffled.

The files are cut into shards: about a megabyte of lines, some rows of a parquet file, or a whole file where it can only be
read from its beginning. An epoch has the shards in an order of its own. ``SHARDS`` of them are under way at a time; a block is
the next piece of each, its documents shuffled. All of it follows from the seed and the position, so every rank has the same
blocks, whatever the number of ranks and workers; and a position is small, and is found again without reading what was before.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import DataError, InternEvoError
from ...text.tokenizer import tokenizer_fingerprint
from ..encoding.encode import Encoded, EncoderPool
from ..order import permute
from ..raw.inputs import InputChunk, is_sequential, split_file, split_files
from .exchange import Exchange, Numbers

SHARDS = 16
"""Shards under way: documents of so many places in the data are shuffled together."""


@dataclass(frozen=True)
class Shard:
    """A part of the input that is taken up at once."""

    kind: str
    path: Path
    type: int
    """Dataset type of its documents."""
    minimum: int
    """Shorter documents are left out."""
    chunk: InputChunk | None
    """None: the pieces of the file come one after another."""


def make_shards(files: list[tuple[str, Path]], type: int, minimum: int) -> Iterator[Shard]:
    """The shards of files; small texts share one."""
    for sequential, group in groupby(files, lambda file: is_sequential(*file)):
        if sequential:
            yield from (Shard(kind, path, type, minimum, None) for kind, path in group)
        else:
            yield from (Shard(chunk.kind, Path(chunk.files[0]), type, minimum, chunk) for chunk in split_files(list(group)))


@dataclass(frozen=True)
class Position:
    """Where a block begins."""

    epoch: int = 0
    block: int = 0
    """Of the epoch."""
    taken: int = 0
    """Shards of the epoch that were taken up."""
    under_way: tuple[tuple[int, int], ...] = ()
    """(place in the epoch's order, pieces read) of each shard under way."""

    def to_list(self) -> list[Any]:
        """As JSON values."""
        return [self.epoch, self.block, self.taken, [list(pair) for pair in self.under_way]]

    @classmethod
    def of(cls, values: list[Any]) -> Position:
        """From JSON values."""
        epoch, block, taken, under_way = values
        return cls(epoch, block, taken, tuple((place, piece) for place, piece in under_way))


@dataclass
class Block:
    """Whole documents, one after another."""

    position: Position
    ids: npt.NDArray[np.int32]
    """With signs."""
    ends: npt.NDArray[np.int64]
    """[documents]: where each ends in ``ids``."""
    types: npt.NDArray[np.int16]
    """[documents]"""
    bad: list[str] = field(default_factory=list)
    """What this rank has left out."""


@dataclass
class _Piece:
    """What was read of one shard."""

    place: int
    read: int
    """Pieces of it up to here."""
    ended: bool
    ids: Numbers
    counts: Numbers


class Blocks:
    """All blocks behind a position."""

    def __init__(
        self, shards: list[Shard], seed: int, pool: EncoderPool, exchange: Exchange, epochs: int | None = None
    ) -> None:
        """``epochs``: how many there are; None: no end."""
        self.shards, self.seed, self.pool, self.exchange, self.epochs = shards, seed, pool, exchange, epochs
        self.open: dict[int, tuple[int, Iterator[InputChunk]]] = {}
        """By place in the order: pieces read, and those to come, of files that are read from their beginning."""
        self.flow: Iterator[Encoded] | None = None
        """This rank's pieces of this block and those behind it, where it is known beforehand which these are."""
        self._fingerprint = self._describe()

    def __call__(self, position: Position) -> Generator[Block, None, None]:
        """
        Raises:
            DataError: on every rank, when one of them cannot read its part, or an epoch holds no token.
        """
        empty, self.exchange.over = position.block == 0, False
        known = all(shard.chunk is not None for shard in self.shards)
        self.flow = self.pool.encode(self._known_chunks(position)) if known else None
        try:
            while (following := self._begin(position)) is not None:
                if following.epoch > position.epoch:
                    if empty:
                        raise DataError("the streaming data holds no document to train on")
                    empty = True
                position, bad = following, list[str]()
                pieces = [piece for numbers in self.exchange(self._encode(position, bad)) for piece in _unpack(numbers)]
                block = self._block(position, sorted(pieces, key=lambda piece: piece.place), bad)
                empty = empty and not len(block.ids)
                yield block
                ended = {piece.place: piece.read for piece in pieces if not piece.ended}
                position = replace(position, block=position.block + 1, under_way=tuple(sorted(ended.items())))
        finally:
            self.exchange.leave()
            self.pool.close()

    def fingerprint(self) -> str:
        """Says whether two datasets hold the same documents in the same order, as far as names, sizes and options tell."""
        return self._fingerprint

    def _describe(self) -> str:
        shards = [
            (s.kind, s.path.name, s.chunk.size if s.chunk else s.path.stat().st_size, s.type, s.minimum) for s in self.shards
        ]
        encoder = self.pool.encoder
        options = [SHARDS, self.seed, encoder.format, encoder.key, tokenizer_fingerprint(encoder.tokenizer)]
        return hashlib.sha256(json.dumps([shards, options]).encode()).hexdigest()[:16]

    def _order(self, position: Position, place: int) -> Shard:
        key = f"{self.seed}/{position.epoch}/shards"
        return self.shards[int(permute(np.array([place]), len(self.shards), key)[0])]

    def _begin(self, position: Position) -> Position | None:
        """The position with as many shards under way as there may be, in the next epoch when none is left; None at the end."""
        while self.epochs is None or position.epoch < self.epochs:
            taken = min(position.taken + _limit(position) - len(position.under_way), len(self.shards))
            new = tuple((place, 0) for place in range(position.taken, taken))
            if position.under_way or new:
                return replace(position, taken=taken, under_way=position.under_way + new)
            if not self.shards:
                raise DataError("the streaming data holds no document to train on")
            position = Position(position.epoch + 1)
        return None

    def _known_chunks(self, position: Position) -> Iterator[InputChunk]:
        """This rank's chunks behind a position, where each shard is one chunk: workers go on while a block is put together."""
        while (following := self._begin(position)) is not None:
            for place, _ in self._mine(following):
                yield from self._chunks(following, place, 0, 1)
            position = replace(following, block=following.block + 1, under_way=())

    def _mine(self, position: Position) -> list[tuple[int, int]]:
        """The shards under way that fall to this rank, by their place."""
        return [pair for pair in position.under_way if pair[0] % self.exchange.size == self.exchange.rank]

    def _encode(self, position: Position, bad: list[str]) -> Numbers | DataError:
        """This rank's pieces."""
        most, mine, pieces = max(1, _limit(position) // len(position.under_way)), self._mine(position), []
        try:
            if self.flow is not None:
                counts, encoded = [1] * len(mine), self.flow
            else:
                chunks = [self._chunks(position, place, read, most) for place, read in mine]
                counts, encoded = [len(found) for found in chunks], self.pool.encode(chain.from_iterable(chunks))
            for (place, read), count in zip(mine, counts, strict=True):
                parts = list(islice(encoded, count))
                bad += [message for part in parts for message in part.skipped]
                pieces.append(_Piece(place, read + len(parts), place not in self.open, *_joined(parts)))
        except InternEvoError as error:
            return DataError(str(error))
        return _pack(pieces)

    def _chunks(self, position: Position, place: int, read: int, most: int) -> list[InputChunk]:
        """The next piece of a shard, or up to ``most`` of a file that is read from its beginning, which then stays open."""
        shard = self._order(position, place)
        if shard.chunk is not None:
            return [shard.chunk]
        before, rest = self.open.pop(place, (0, None))
        if rest is None or before != read:
            rest = islice(split_file(shard.kind, shard.path), read, None)
        found = list(islice(rest, most))
        if len(found) == most:
            self.open[place] = (read + most, rest)
        return found

    def _block(self, position: Position, pieces: list[_Piece], bad: list[str]) -> Block:
        """Documents of all pieces, shuffled."""
        ids = np.concatenate([piece.ids for piece in pieces])
        counts = np.concatenate([piece.counts for piece in pieces]).astype(np.int64)
        shards = [self._order(position, piece.place) for piece in pieces]
        lengths = [len(piece.counts) for piece in pieces]
        types = np.repeat(np.array([shard.type for shard in shards], np.int16), lengths)
        minimums = np.repeat([shard.minimum for shard in shards], lengths)
        starts = np.cumsum(counts) - counts
        kept = np.flatnonzero(counts >= minimums)
        digest = hashlib.sha256(f"{self.seed}/{position.epoch}/{position.block}".encode()).digest()
        shuffled = np.random.default_rng(list(digest)).permutation(kept)
        sizes = counts[shuffled]
        ends = np.cumsum(sizes)
        where = np.arange(int(sizes.sum())) + np.repeat(starts[shuffled] - (ends - sizes), sizes)
        return Block(position, ids[where], ends, types[shuffled], bad)


def _limit(position: Position) -> int:
    """Shards under way: few at first, so that a run begins soon."""
    return SHARDS if position.epoch or position.block > 2 else min(SHARDS, 2 << position.block)


def _joined(parts: list[Encoded]) -> tuple[Numbers, Numbers]:
    empty = np.empty(0, np.int32)
    return np.concatenate([empty, *(p.ids for p in parts)]), np.concatenate([empty, *(p.counts for p in parts)])


HEADER = 5


def _pack(pieces: list[_Piece]) -> Numbers:
    """All pieces in one array: for each a header, the counts and the ids."""
    arrays = [np.empty(0, np.int32)]
    for piece in pieces:
        header = [piece.place, piece.read, piece.ended, len(piece.counts), len(piece.ids)]
        arrays += [np.array(header, np.int32), piece.counts, piece.ids]
    return np.concatenate(arrays)


def _unpack(numbers: Numbers) -> Iterator[_Piece]:
    while len(numbers):
        place, read, ended, documents, tokens = (int(n) for n in numbers[:HEADER])
        counts, ids, numbers = np.split(numbers[HEADER:], [documents, documents + tokens])
        yield _Piece(place, read, bool(ended), ids, counts)
