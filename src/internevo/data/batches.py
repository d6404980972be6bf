"""Which rows form a step, which of them are this rank's, and the tensors made from them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..config.data import Data
from .order import Order
from .rows import Row, Rows


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


@dataclass
class TrainBatches:
    """This rank's batches from a cursor on, made ahead by one thread."""

    rows: Rows
    order: Order
    sizes: BatchSizes
    rank: int
    packed: bool
    total: int
    """Batches in all."""
    skips: list[range] = field(default_factory=list)
    pin: bool = False
    """Leave the batches in page-locked memory."""
    ahead: int = 2

    def row_numbers(self, batch: int, consumed: int) -> list[list[int]]:
        """Rows of each of this rank's micro-batches. Together the ranks have the next ``sizes.rows(batch)`` of the order."""
        sizes = self.sizes
        shape = (sizes.micro_batches(batch), sizes.ranks, sizes.micro_bsz)
        places = np.arange(consumed, consumed + sizes.rows(batch)).reshape(shape)[:, self.rank]
        return [self.order(part).tolist() for part in places]

    def make(self, cursor: Cursor) -> Iterator[StepBatch]:
        """Batches one after another, from ``cursor`` on."""
        rows = cursor.rows
        for batch in range(cursor.batch, self.total):
            before, rows = rows, rows + self.sizes.rows(batch)
            if any(batch in skip for skip in self.skips):
                continue
            made = [micro_batch([self.rows[n] for n in numbers], self.packed) for numbers in self.row_numbers(batch, before)]
            made = [m.pinned() for m in made] if self.pin else made
            yield StepBatch(made, batch, Cursor(batch + 1, rows), (rows - before) * self.rows.seq_len)

    def prefetch(self, cursor: Cursor) -> Iterator[StepBatch]:
        """The same, made ahead in a thread; an error there is raised here."""
        made: queue.Queue[StepBatch | BaseException | None] = queue.Queue(self.ahead)
        stopped = threading.Event()

        def put(item: StepBatch | BaseException | None) -> None:
            while not stopped.is_set():
                try:
                    made.put(item, timeout=0.2)
                    return
                except queue.Full:
                    continue

        def work() -> None:
            try:
                for batch in self.make(cursor):
                    put(batch)
                    if stopped.is_set():
                        return
                put(None)
            except BaseException as error:
                put(error)

        thread = threading.Thread(target=work, name="data", daemon=True)
        thread.start()
        try:
            while (item := made.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stopped.set()
            thread.join()


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
