"""The interface of all sources of rows, and shuffled rows as a source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from .order import Order
from .rows import ReadableRows, Row, Rows

Position = Any
"""A position in the data: JSON values, which checkpoints hold. Only the source that made them knows what they mean."""


@dataclass
class NextRows:
    """The next rows of a source."""

    rows: list[Row]
    """The rows that this rank needs, in the order in which it asked for them."""
    count: int
    """The number of all next rows, needed or not. It is less than was asked for if the source has ended."""
    position: Position
    """The position after these rows."""
    skipped: list[str] = field(default_factory=list)
    """For each document or row that could not be read and was skipped: a message that says where it is and why. One rank has
    it."""


class Source(Protocol):
    """Rows in an order that depends only on the seed and the data, and is the same on every rank."""

    seq_len: int
    """The number of tokens in a row."""
    types: list[str]
    """The names of the dataset types; ``Row.types`` has their numbers."""

    def fingerprint(self) -> str:
        """Returns a text that changes when the rows or their order change."""

    def start_position(self) -> Position:
        """Returns the position before the first row."""

    def next_rows(self, position: Position, count: int, needed: Sequence[int]) -> NextRows:
        """Returns the ``count`` rows after ``position``.

        Args:
            needed: the numbers (0 to ``count - 1``) of the rows that this rank needs. Only these are returned.
        """

    def position_after_change(self, position: Position) -> Position:
        """Returns where a run continues after the data has changed; ``position`` is from before the change."""

    def close(self) -> None:
        """Ends the threads and processes of the source."""


class ShuffledRows:
    """A source of numbered rows in random order, each once per epoch. A position is the number of rows before it."""

    def __init__(
        self, rows: Rows, seed: int, skip_errors: bool = False, epochs: float | None = None, reports: bool = True
    ) -> None:
        """Makes the source.

        Args:
            skip_errors: a row that cannot be read is replaced by an empty one.
            epochs: the number of epochs after which the source ends; None: it never ends.
            reports: ``NextRows.skipped`` names the rows that were replaced. Of the ranks that have the same rows, one does.
        """
        self.rows, self.skip_errors, self.reports = rows, skip_errors, reports
        self.order = Order(len(rows), seed)
        self.end = None if epochs is None else int(epochs * len(rows))
        self.seq_len, self.types = rows.seq_len, rows.types

    def fingerprint(self) -> str:
        """Returns a text that changes when the rows or their order change."""
        return f"{self.rows.fingerprint()}-{self.order.seed}"

    def start_position(self) -> int:
        """Returns 0."""
        return 0

    def next_rows(self, position: Position, count: int, needed: Sequence[int]) -> NextRows:
        """Returns rows ``position`` to ``position + count - 1`` of the shuffled order."""
        if self.end is not None:
            count = max(0, min(count, self.end - position))
        skipped: list[str] = []
        numbers = self.order(position + np.array([n for n in needed if n < count], np.int64))
        rows = ReadableRows(self.rows, skipped.append if self.reports else None) if self.skip_errors else self.rows
        return NextRows([rows[int(number)] for number in numbers], count, position + count, skipped)

    def position_after_change(self, position: Position) -> int:
        """Returns the same number of rows."""
        return position if isinstance(position, int) else 0

    def close(self) -> None:
        """Does nothing: there are no threads and no processes."""
