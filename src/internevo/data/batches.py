"""Which rows form a step, which of them are this rank's, and the tensors made from them."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..config.data import Data
from ..errors import DataError
from .ahead import Ahead
from .rows import Row, Rows
from .source import Place, Source


@dataclass
class MicroBatch:
    """What goes through the model at once."""

    tokens: Tensor
    """int64 [1, rows * S] packed, or [rows, S] padded."""
    labels: Tensor
    """As tokens; -100 where nothing is predicted."""
    types: Tensor
    """As tokens: dataset type of each token."""
    cu_seqlens: Tensor | None
    """int32 [documents + 1] on the host; None for padded rows."""

    def to(self, device: torch.device) -> MicroBatch:
        """On ``device``, without waiting when the memory is pinned. Document borders stay on the host."""
        tokens, labels, types = (t.to(device, non_blocking=True) for t in (self.tokens, self.labels, self.types))
        return MicroBatch(tokens, labels, types, self.cu_seqlens)

    def pinned(self) -> MicroBatch:
        """In page-locked memory, from which a GPU copies by itself."""
        return MicroBatch(self.tokens.pin_memory(), self.labels.pin_memory(), self.types.pin_memory(), self.cu_seqlens)


def micro_batch(rows: Sequence[Row], packed: bool) -> MicroBatch:
    """Joins rows to one packed row, or stacks them."""
    tokens, labels, types = (np.stack([getattr(r, k) for r in rows]) for k in ("tokens", "labels", "types"))
    if not packed:
        return MicroBatch(torch.from_numpy(tokens), torch.from_numpy(labels), torch.from_numpy(types), None)
    size = len(rows[0].tokens)
    borders = [n * size + b for n, row in enumerate(rows) for b in row.borders] + [len(rows) * size]
    tokens, labels, types = (x.reshape(1, -1) for x in (tokens, labels, types))
    return MicroBatch(
        torch.from_numpy(tokens), torch.from_numpy(labels), torch.from_numpy(types), torch.tensor(borders, dtype=torch.int32)
    )


@dataclass(frozen=True)
class BatchSizes:
    """Rows per step: ``micro_num`` micro-batches of ``micro_bsz`` rows on each of ``ranks``."""

    micro_bsz: int
    micro_num: int
    ranks: int
    start: int = 0
    increment: int = 0
    every: int = 0
    """Ramp-up: ``micro_num`` begins at ``start`` and grows by ``increment`` every so many steps; 0: none."""

    @classmethod
    def of(cls, data: Data, ranks: int) -> BatchSizes:
        """From the config and the number of data ranks."""
        micro_num = data.micro_num
        if data.global_batch_size:
            micro_num = data.global_batch_size // (data.micro_bsz * ranks)
        ramp = [int(part) for part in data.rampup_batch_size.split()] if data.rampup_batch_size else []
        return cls(data.micro_bsz, micro_num, ranks, *ramp)

    def micro_batches(self, batch: int) -> int:
        """Micro-batches of each rank in batch number ``batch`` (from 0)."""
        if not self.every:
            return self.micro_num
        return min(self.start + self.increment * (batch // self.every), self.micro_num)

    def rows(self, batch: int) -> int:
        """Rows of the global batch."""
        return self.micro_batches(batch) * self.micro_bsz * self.ranks


def parse_skips(text: str) -> list[range]:
    """ "3,10-20" as ranges of batch numbers, both ends included."""
    parts = [p.split("-") for p in text.replace(" ", "").split(",") if p]
    return [range(int(p[0]), int(p[-1]) + 1) for p in parts]


@dataclass
class Cursor:
    """The position in the data: the same on every rank, and all that a resumed run needs."""

    batch: int = 0
    """Batches drawn, skipped ones included."""
    rows: int = 0
    """Rows drawn."""
    place: Place = None
    """In the source; None: at its start."""


@dataclass
class StepBatch:
    """One step's micro-batches of this rank."""

    micro_batches: list[MicroBatch]
    number: int
    """Batch number, from 0."""
    after: Cursor
    """The position once this batch is trained."""
    tokens: int
    """Tokens of the global batch, padding included."""
    bad: list[str] = field(default_factory=list)
    """What could not be read and was left out on this rank, up to here."""


@dataclass
class TrainBatches:
    """This rank's batches from a cursor on, made ahead by one thread."""

    source: Source
    sizes: BatchSizes
    rank: int
    packed: bool
    total: int
    """Batches in all."""
    skips: list[range] = field(default_factory=list)
    pin: bool = False
    """Leave the batches in page-locked memory."""
    ahead: int = 2

    def mine(self, batch: int) -> list[int]:
        """This rank's rows among those of the global batch, one micro-batch after another."""
        sizes = self.sizes
        shape = (sizes.micro_batches(batch), sizes.ranks, sizes.micro_bsz)
        return np.arange(sizes.rows(batch)).reshape(shape)[:, self.rank].ravel().tolist()

    def make(self, cursor: Cursor) -> Generator[StepBatch, None, None]:
        """Batches one after another, from ``cursor`` on.

        Raises:
            DataError: when the source cannot be read, or has ended.
        """
        source, size = self.source, self.sizes.micro_bsz
        place, rows = source.start() if cursor.place is None else cursor.place, cursor.rows
        bad: list[str] = []
        try:
            for batch in range(cursor.batch, self.total):
                count, skip = self.sizes.rows(batch), any(batch in skip for skip in self.skips)
                taken = source.take(place, count, [] if skip else self.mine(batch))
                if taken.count < count:
                    raise DataError(f"the data ends in batch {batch}: train fewer steps (data.total_steps)")
                place, rows = taken.place, rows + count
                bad += taken.bad
                if skip:
                    continue
                made = [micro_batch(taken.rows[n : n + size], self.packed) for n in range(0, len(taken.rows), size)]
                made = [m.pinned() for m in made] if self.pin else made
                yield StepBatch(made, batch, Cursor(batch + 1, rows, place), count * source.seq_len, bad)
                bad = []
        finally:
            source.close()

    def prefetch(self, cursor: Cursor) -> Iterator[StepBatch]:
        """The same, made ahead in a thread; an error there is raised here."""
        made = Ahead(self.make(cursor), self.ahead, "data")
        try:
            yield from made
        finally:
            made.close()


def valid_batches(rows: Rows, micro_bsz: int, rank: int, ranks: int, packed: bool, limit: int | None) -> Iterator[MicroBatch]:
    """This rank's share of every validation row. All ranks yield equally often: missing rows are repeated without labels."""
    count = min(len(rows), limit) if limit else len(rows)
    for first in range(0, count, micro_bsz * ranks):
        numbers = [first + rank * micro_bsz + n for n in range(micro_bsz)]
        chosen = [rows[min(n, count - 1)] for n in numbers]
        for number, row in zip(numbers, chosen, strict=True):
            if number >= count:
                row.labels[:] = -100
        yield micro_batch(chosen, packed)
