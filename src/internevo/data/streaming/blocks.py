"""The blocks of a streaming dataset: documents that all ranks encode together, and that are shuffled together.

The files are split into shards: about a megabyte of lines, some rows of a parquet file, or a whole file if it can only be read
from its beginning. Each epoch has the shards in a different order. Up to ``MAX_SHARDS`` shards are read at a time; a block is
the next chunks of each of them, with the documents shuffled. Everything follows from the seed and the position. So all ranks
have the same blocks, for any number of ranks and workers; and a run can resume at a position, which is a few numbers, without
reading what came before it.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain, groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...config.data import TEMPLATE_DATE
from ...errors import DataError, InternEvoError
from ...text.tokenizer import tokenizer_fingerprint
from ...wording import counted
from ..encoding.encode import Encoded, EncoderPool
from ..order import permute
from ..raw.files import sample_content
from ..raw.inputs import InputChunk, is_sequential, split_file, split_files
from .exchange import Exchange, Int32Array

log = logging.getLogger("internevo")
MAX_SHARDS = 16
"""How many shards are read at a time: the documents of a block come from that many parts of the data."""


@dataclass(frozen=True)
class Shard:
    """A part of the input files that one rank reads and encodes."""

    kind: str
    """The kind of the file, a key of ``raw.inputs.SUFFIXES``."""
    path: Path
    type: int
    """The number of its documents' dataset type."""
    min_length: int
    """Documents with fewer tokens are left out."""
    chunk: InputChunk | None
    """The chunk that is the shard. None: the shard is a whole file that can only be read from its beginning, in many chunks."""


def make_shards(files: list[tuple[str, Path]], type: int, min_length: int) -> Iterator[Shard]:
    """Splits files, given as (kind, path), into shards. Small text files share a shard."""
    for sequential, group in groupby(files, lambda file: is_sequential(*file)):
        if sequential:
            yield from (Shard(kind, path, type, min_length, None) for kind, path in group)
        else:
            yield from (Shard(chunk.kind, Path(chunk.files[0]), type, min_length, chunk) for chunk in split_files(list(group)))


@dataclass(frozen=True)
class BlockPosition:
    """Where a block begins in the data."""

    epoch: int = 0
    block: int = 0
    """The number of the block in the epoch."""
    started: int = 0
    """The number of shards of the epoch that have been started."""
    active: tuple[tuple[int, int], ...] = ()
    """(index in the epoch's order, chunks read) of each shard that is being read."""

    def to_list(self) -> list[Any]:
        """Returns the position as JSON values."""
        return [self.epoch, self.block, self.started, [list(pair) for pair in self.active]]

    @classmethod
    def from_list(cls, values: list[Any]) -> BlockPosition:
        """Makes a position from what ``to_list`` returned."""
        epoch, block, started, active = values
        return cls(epoch, block, started, tuple((index, chunks_read) for index, chunks_read in active))


@dataclass
class Block:
    """A block of shuffled documents."""

    position: BlockPosition
    """Where the block begins."""
    ids: npt.NDArray[np.int32]
    """The signed ids of all documents, concatenated."""
    ends: npt.NDArray[np.int64]
    """[documents]: where each document ends in ``ids``."""
    types: npt.NDArray[np.int16]
    """[documents]: the number of each document's dataset type."""
    skipped: list[str] = field(default_factory=list)
    """For each document that could not be read on this rank and was skipped: a message."""


@dataclass
class _ShardPart:
    """The part of one shard that is in a block."""

    index: int
    """The shard's index in the epoch's order."""
    chunks_read: int
    """The number of the shard's chunks up to the end of this part."""
    ended: bool
    """Nothing is left of the shard."""
    ids: Int32Array
    """The signed ids of all documents, concatenated."""
    counts: Int32Array
    """[documents]: the number of tokens of each document."""


class BlockReader:
    """Reads the blocks of a streaming dataset, on all ranks together."""

    def __init__(
        self, shards: list[Shard], seed: int, pool: EncoderPool, exchange: Exchange, epochs: int | None = None
    ) -> None:
        """Makes a reader.

        Args:
            shards: the shards of the dataset, the same on every rank.
            epochs: the number of epochs after which the blocks end; None: they never end.
        """
        self.shards, self.seed, self.pool, self.exchange, self.epochs = shards, seed, pool, exchange, epochs
        self.open_files: dict[int, tuple[int, Iterator[InputChunk]]] = {}
        """For active shards that are whole files, by their index in the order: (chunks read, iterator over the next chunks)."""
        self.encoded: Iterator[Encoded] | None = None
        """This rank's chunks of this block and of all later ones, encoded ahead of time. None if a shard is a whole file: then
        it is not known in advance in which block it ends."""
        self._fingerprint = self._hash()

    def iterate(self, position: BlockPosition) -> Generator[Block, None, None]:
        """Yields the blocks, beginning at ``position``. Ends the workers at the end.

        Raises:
            DataError: on every rank, if one rank cannot read its share, or an epoch has no tokens.
        """
        empty, self.exchange.ended = position.block == 0, False
        self.open_files.clear()  # a shard of another epoch may have the same index and the same number of chunks read
        known = all(shard.chunk is not None for shard in self.shards)
        self.encoded = self.pool.encode(self._known_chunks(position)) if known else None
        try:
            while (following := self._start_shards(position)) is not None:
                if following.epoch > position.epoch:
                    if empty:
                        raise DataError("the streaming data contains no document to train on")
                    empty = True
                position, skipped = following, list[str]()
                shares = self.exchange.all_gather(self._encode_share(position, skipped))
                parts = [part for share in shares for part in _from_array(share)]
                block = self._shuffle(position, sorted(parts, key=lambda part: part.index), skipped)
                empty = empty and not len(block.ids)
                yield block
                active = {part.index: part.chunks_read for part in parts if not part.ended}
                position = replace(position, block=position.block + 1, active=tuple(sorted(active.items())))
        finally:
            self.exchange.leave()
            self.pool.close()

    def fingerprint(self) -> str:
        """Returns a hash of names, content and options. It changes when the documents or their order change.

        The content of large files is sampled (see ``sample_content``), so a few changed documents may go unnoticed.
        """
        return self._fingerprint

    def _hash(self) -> str:
        files = list(dict.fromkeys(file for s in self.shards for file in (s.chunk.files if s.chunk else (s.path,))))
        shards = [(s.kind, s.path.name, s.chunk.size if s.chunk else 0, s.type, s.min_length) for s in self.shards]
        encoder = self.pool.encoder
        options = [MAX_SHARDS, self.seed, encoder.format, encoder.key, tokenizer_fingerprint(encoder.tokenizer)]
        if encoder.format == "chat" and encoder.today != TEMPLATE_DATE:  # fingerprints from before have no date
            options.append(encoder.today)
        return hashlib.sha256(
            json.dumps([shards, sample_content([Path(file) for file in files]), options]).encode()
        ).hexdigest()[:16]

    def _shard(self, position: BlockPosition, index: int) -> Shard:
        """Returns the shard at ``index`` in the order of the epoch."""
        key = f"{self.seed}/{position.epoch}/shards"
        return self.shards[int(permute(np.array([index]), len(self.shards), key)[0])]

    def _start_shards(self, position: BlockPosition) -> BlockPosition | None:
        """Returns the position with as many active shards as allowed, in the next epoch if this one has no shards left.

        Returns None after the last epoch.
        """
        while self.epochs is None or position.epoch < self.epochs:
            started = min(position.started + _max_shards(position) - len(position.active), len(self.shards))
            new = tuple((index, 0) for index in range(position.started, started))
            if position.active or new:
                return replace(position, started=started, active=position.active + new)
            if not self.shards:
                raise DataError("the streaming data contains no document to train on")
            position = BlockPosition(position.epoch + 1)
        return None

    def _known_chunks(self, position: BlockPosition) -> Iterator[InputChunk]:
        """Yields this rank's chunks after a position, if each shard is one chunk. Workers encode them ahead of time."""
        while (following := self._start_shards(position)) is not None:
            for index, _ in self._rank_shards(following):
                yield from self._next_chunks(following, index, 0, 1)
            position = replace(following, block=following.block + 1, active=())

    def _rank_shards(self, position: BlockPosition) -> list[tuple[int, int]]:
        """Returns (index, chunks read) of the active shards that this rank encodes."""
        return [pair for pair in position.active if pair[0] % self.exchange.size == self.exchange.rank]

    def _encode_share(self, position: BlockPosition, skipped: list[str]) -> Int32Array | DataError:
        """Encodes this rank's parts of a block. Returns them as one array, or the error if they cannot be read."""
        max_chunks = max(1, _max_shards(position) // len(position.active))
        shards, parts, empty = self._rank_shards(position), [], 0
        try:
            if self.encoded is not None:
                counts, encoded = [1] * len(shards), self.encoded
            else:
                chunks = [self._next_chunks(position, index, chunks_read, max_chunks) for index, chunks_read in shards]
                counts, encoded = [len(found) for found in chunks], self.pool.encode(chain.from_iterable(chunks))
            for (index, chunks_read), count in zip(shards, counts, strict=True):
                results = list(islice(encoded, count))
                skipped += [message for result in results for message in result.skipped]
                empty += sum(result.empty for result in results)
                ended = index not in self.open_files
                parts.append(_ShardPart(index, chunks_read + len(results), ended, *_concatenate(results)))
        except InternEvoError as error:
            return DataError(str(error))
        if empty:
            log.info(f"left out of block {position.block + 1}, epoch {position.epoch + 1}: {counted(empty, 'empty document')}")
        return _to_array(parts)

    def _next_chunks(self, position: BlockPosition, index: int, chunks_read: int, max_chunks: int) -> list[InputChunk]:
        """Returns the chunk of a shard; or up to ``max_chunks`` next chunks of a file, which stays open if more may follow."""
        shard = self._shard(position, index)
        if shard.chunk is not None:
            return [shard.chunk]
        before, rest = self.open_files.pop(index, (0, None))
        if rest is None or before != chunks_read:
            rest = islice(split_file(shard.kind, shard.path), chunks_read, None)
        found = list(islice(rest, max_chunks))
        if len(found) == max_chunks:
            self.open_files[index] = (chunks_read + max_chunks, rest)
        return found

    def _shuffle(self, position: BlockPosition, parts: list[_ShardPart], skipped: list[str]) -> Block:
        """Makes a block of the documents of all parts, without those that are too short."""
        ids = np.concatenate([part.ids for part in parts])
        counts = np.concatenate([part.counts for part in parts]).astype(np.int64)
        shards = [self._shard(position, part.index) for part in parts]
        documents = [len(part.counts) for part in parts]
        types = np.repeat(np.array([shard.type for shard in shards], np.int16), documents)
        min_lengths = np.repeat([shard.min_length for shard in shards], documents)
        starts = np.cumsum(counts) - counts
        kept = np.flatnonzero(counts >= min_lengths)
        digest = hashlib.sha256(f"{self.seed}/{position.epoch}/{position.block}".encode()).digest()
        shuffled = np.random.default_rng(list(digest)).permutation(kept)
        sizes = counts[shuffled]
        ends = np.cumsum(sizes)
        indices = np.arange(int(sizes.sum())) + np.repeat(starts[shuffled] - (ends - sizes), sizes)
        return Block(position, ids[indices], ends, types[shuffled], skipped)


def _max_shards(position: BlockPosition) -> int:
    """Returns how many shards may be active: few at first, so that a run starts quickly."""
    return MAX_SHARDS if position.epoch or position.block > 2 else min(MAX_SHARDS, 2 << position.block)


def _concatenate(results: list[Encoded]) -> tuple[Int32Array, Int32Array]:
    """Returns the ids and the counts of all results."""
    empty = np.empty(0, np.int32)
    return np.concatenate([empty, *(r.ids for r in results)]), np.concatenate([empty, *(r.counts for r in results)])


HEADER_SIZE = 5
"""The number of values before the counts and ids of each part in an array of ``_to_array``."""


def _to_array(parts: list[_ShardPart]) -> Int32Array:
    """Returns parts as one array: for each part a header, the counts and the ids."""
    arrays = [np.empty(0, np.int32)]
    for part in parts:
        header = [part.index, part.chunks_read, part.ended, len(part.counts), len(part.ids)]
        arrays += [np.array(header, np.int32), part.counts, part.ids]
    return np.concatenate(arrays)


def _from_array(array: Int32Array) -> Iterator[_ShardPart]:
    """Yields the parts that ``_to_array`` made an array of."""
    while len(array):
        index, chunks_read, ended, documents, tokens = (int(n) for n in array[:HEADER_SIZE])
        counts, ids, array = np.split(array[HEADER_SIZE:], [documents, documents + tokens])
        yield _ShardPart(index, chunks_read, bool(ended), ids, counts)
