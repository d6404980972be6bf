"""Batches for training and validation: which rows form a global batch, and the micro-batches of this rank."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config.data import Data
from ..errors import DataError
from .prefetch import Prefetcher
from .rows import IGNORE, Row, Rows
from .source import Position, Source


@dataclass
class MicroBatch:
    """The rows that go through the model at once."""

    tokens: Tensor
    """int64 [1, rows * S] if rows are packed, [rows, S] if they are padded."""
    labels: Tensor
    """int64, same shape as ``tokens``: the id to predict at each token, or -100."""
    types: Tensor
    """int16, same shape as ``tokens``: the number of each token's dataset type."""
    cu_seqlens: Tensor | None
    """int32 [documents + 1], on the CPU: the cumulative lengths of the documents; None for padded rows."""

    def to(self, device: torch.device) -> MicroBatch:
        """Copies the micro-batch to ``device``; asynchronously if it is in pinned memory. ``cu_seqlens`` stays on the CPU."""
        tokens, labels, types = (t.to(device, non_blocking=True) for t in (self.tokens, self.labels, self.types))
        return MicroBatch(tokens, labels, types, self.cu_seqlens)

    def pin_memory(self) -> MicroBatch:
        """Copies the micro-batch to pinned memory, from which it can be copied to a GPU asynchronously."""
        return MicroBatch(self.tokens.pin_memory(), self.labels.pin_memory(), self.types.pin_memory(), self.cu_seqlens)


def collate(rows: Sequence[Row], packed: bool) -> MicroBatch:
    """Makes a micro-batch of rows: packed rows are concatenated to one long row, padded rows are stacked."""
    tokens, labels, types = (np.stack([getattr(r, k) for r in rows]) for k in ("tokens", "labels", "types"))
    if not packed:
        return MicroBatch(torch.from_numpy(tokens), torch.from_numpy(labels), torch.from_numpy(types), None)
    size = len(rows[0].tokens)
    cu_seqlens = [n * size + start for n, row in enumerate(rows) for start in row.document_starts] + [len(rows) * size]
    tokens, labels, types = (x.reshape(1, -1) for x in (tokens, labels, types))
    return MicroBatch(
        torch.from_numpy(tokens), torch.from_numpy(labels), torch.from_numpy(types), torch.tensor(cu_seqlens, dtype=torch.int32)
    )


@dataclass(frozen=True)
class BatchSizes:
    """The sizes of micro-batches and of the global batch."""

    micro_bsz: int
    """Rows per micro-batch."""
    micro_num: int
    """Micro-batches per step on each data rank."""
    data_ranks: int
    """The number of ranks that have different data."""
    rampup_start: int = 0
    rampup_increment: int = 0
    rampup_steps: int = 0
    """Ramp-up: ``micro_num`` begins at ``rampup_start`` and grows by ``rampup_increment`` every ``rampup_steps`` steps. 0: no
    ramp-up."""

    @classmethod
    def from_config(cls, data: Data, data_ranks: int) -> BatchSizes:
        """Returns the sizes for the data section of a config and the number of data ranks."""
        start, increment, steps = (int(part) for part in (data.rampup_batch_size or "0 0 0").split())
        if not data.global_batch_size:
            return cls(data.micro_bsz, data.micro_num, data_ranks, start, increment, steps)
        rows = data.micro_bsz * data_ranks  # of a micro-batch on every data rank; it divides what the config has in rows
        return cls(data.micro_bsz, data.global_batch_size // rows, data_ranks, start // rows, increment // rows, steps)

    def in_rows(self) -> dict[str, Any]:
        """Returns the keys of the data section that mean the same batches on any number of data ranks."""
        rows = self.micro_bsz * self.data_ranks
        ramp = f"{self.rampup_start * rows} {self.rampup_increment * rows} {self.rampup_steps}" if self.rampup_steps else None
        return {"global_batch_size": self.micro_num * rows, "rampup_batch_size": ramp}

    def micro_batches(self, batch: int) -> int:
        """Returns the number of micro-batches on each data rank in batch ``batch`` (counted from 0)."""
        if not self.rampup_steps:
            return self.micro_num
        return min(self.rampup_start + self.rampup_increment * (batch // self.rampup_steps), self.micro_num)

    def rows(self, batch: int) -> int:
        """Returns the number of rows in the global batch ``batch`` (counted from 0)."""
        return self.micro_batches(batch) * self.micro_bsz * self.data_ranks


def parse_skip_batches(text: str) -> list[range]:
    """Returns the batch numbers in a text such as "3,10-20", in which both ends of a range are included."""
    parts = [p.split("-") for p in text.replace(" ", "").split(",") if p]
    return [range(int(p[0]), int(p[-1]) + 1) for p in parts]


@dataclass
class Cursor:
    """How far a run has come in the data: the same on every rank, and everything that is needed to resume."""

    batch: int = 0
    """The number of batches so far, skipped ones included."""
    rows: int = 0
    """The number of rows so far."""
    position: Position = None
    """The position in the source; None: before the first row."""


@dataclass
class StepBatch:
    """This rank's micro-batches for one step."""

    micro_batches: list[MicroBatch]
    number: int
    """The number of the batch, counted from 0."""
    next_cursor: Cursor
    """Where the run continues after this batch."""
    tokens: int
    """The number of tokens in the global batch, padding included."""
    skipped: list[str] = field(default_factory=list)
    """For each document or row that could not be read on this rank and was skipped since the last batch: a message."""


@dataclass
class TrainBatches:
    """This rank's batches for training."""

    source: Source
    sizes: BatchSizes
    data_rank: int
    packed: bool
    """Rows are packed; else they are padded."""
    total_batches: int
    skip_batches: list[range] = field(default_factory=list)
    """The batches whose rows are consumed without training on them."""
    pin_memory: bool = False
    """Copy the batches to pinned memory."""
    prefetch_batches: int = 2
    """How many batches ``prefetch`` makes ahead."""

    @property
    def last_step(self) -> int:
        """The number of steps until the last batch that is trained on, skipped ones before it included; 0 if there is none."""
        last = self.total_batches
        for numbers in reversed(self.skip_batches):  # they ascend (config.check)
            if numbers.start < last <= numbers.stop:
                last = numbers.start
        return last

    def skipped_until(self, step: int) -> int:
        """Returns how many of the first ``step`` batches are skipped."""
        return sum(len(range(numbers.start, min(numbers.stop, step))) for numbers in self.skip_batches)

    def rank_rows(self, batch: int) -> list[int]:
        """Returns which rows of the global batch are this rank's, in the order of its micro-batches."""
        sizes = self.sizes
        shape = (sizes.micro_batches(batch), sizes.data_ranks, sizes.micro_bsz)
        return np.arange(sizes.rows(batch)).reshape(shape)[:, self.data_rank].ravel().tolist()

    def iterate(self, cursor: Cursor) -> Generator[StepBatch, None, None]:
        """Yields this rank's part of each batch, beginning at ``cursor``. Closes the source at the end.

        Raises:
            DataError: if the source cannot be read, or has ended.
        """
        source, size = self.source, self.sizes.micro_bsz
        position = source.start_position() if cursor.position is None else cursor.position
        rows = cursor.rows
        skipped: list[str] = []
        try:
            for batch in range(cursor.batch, self.last_step):
                count, skip = self.sizes.rows(batch), any(batch in numbers for numbers in self.skip_batches)
                found = source.next_rows(position, count, [] if skip else self.rank_rows(batch))
                if found.count < count:
                    raise DataError(f"the training data ends in batch {batch}: train fewer steps (data.total_steps)")
                position, rows = found.position, rows + count
                skipped += found.skipped
                if skip:
                    continue
                micro_batches = [collate(found.rows[n : n + size], self.packed) for n in range(0, len(found.rows), size)]
                if self.pin_memory:
                    micro_batches = [m.pin_memory() for m in micro_batches]
                next_cursor = Cursor(batch + 1, rows, position)
                yield StepBatch(micro_batches, batch, next_cursor, count * source.seq_len, skipped)
                skipped = []
        finally:
            source.close()

    def prefetch(self, cursor: Cursor) -> Iterator[StepBatch]:
        """Yields the same batches as ``iterate``, which runs in a thread, ``prefetch_batches`` batches ahead."""
        prefetcher = Prefetcher(self.iterate(cursor), self.prefetch_batches, "data")
        try:
            yield from prefetcher
        finally:
            prefetcher.close()


def valid_batches(
    rows: Rows, micro_bsz: int, data_rank: int, data_ranks: int, packed: bool, limit: int | None
) -> Iterator[MicroBatch]:
    """Yields this rank's part of the validation rows.

    All ranks yield the same number of micro-batches. Rows that are missing for this are repeated, with all labels -100.

    Args:
        limit: the number of rows to use; None: all of them.
    """
    count = min(len(rows), limit) if limit else len(rows)
    for first in range(0, count, micro_bsz * data_ranks):
        numbers = [first + data_rank * micro_bsz + n for n in range(micro_bsz)]
        chosen = [rows[min(n, count - 1)] for n in numbers]
        for number, row in zip(numbers, chosen, strict=True):
            if number >= count:
                row.labels[:] = IGNORE
        yield collate(chosen, packed)
