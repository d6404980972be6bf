"""The interface of all sources of rows, and shuffled rows as a source."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from ..wording import counted
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


@dataclass(frozen=True)
class Saved:
    """What a checkpoint has of a source, whose data or config may have changed since."""

    position: Position
    fingerprint: str | None
    """``Source.fingerprint`` at that time. None: the checkpoint does not say it."""

    def parts(self) -> dict[str, Saved]:
        """Returns what it has of the parts of a mixture, by their names; nothing if the source was none."""
        if not isinstance(self.position, dict):
            return {}
        # Older checkpoints have no fingerprint of a part: its entry is [position, pass].
        return {name: Saved(entry[0], entry[2] if len(entry) > 2 else None) for name, entry in self.position.items()}

    def find(self, shares_positions: Callable[[str], bool]) -> Saved | None:
        """Returns this, or that of the first part, whose fingerprint ``shares_positions``; None if there is none."""
        return next((s for s in (self, *self.parts().values()) if s.fingerprint and shares_positions(s.fingerprint)), None)


@dataclass(frozen=True)
class Continued:
    """Where a run continues in a source whose data may have changed."""

    position: Position
    how: str
    """For the user: "where it was", or where else."""


WHERE_IT_WAS, AT_THE_BEGINNING = "where it was", "at the beginning"


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

    def continue_from(self, saved: Saved) -> Continued:
        """Returns where a run continues that was at ``saved``, if the data may have changed since."""

    def close(self) -> None:
        """Ends the threads and processes of the source."""


class SingleSource(Source, Protocol):
    """A source that is no mixture, and may be a part of one."""

    def shares_positions(self, fingerprint: str) -> bool:
        """Returns whether a position in a source with this fingerprint is the same position in this source."""

    def is_over(self, position: Position) -> bool:
        """Returns whether a source that has once ended at ``position`` has no more rows; it may have been given more epochs."""


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

    def shares_positions(self, fingerprint: str) -> bool:
        """Returns whether the rows and their order are the same."""
        return fingerprint == self.fingerprint()

    def continue_from(self, saved: Saved) -> Continued:
        """Returns the same position in the same rows, and in other rows the position after the same number of them."""
        if (same := saved.find(self.shares_positions)) is not None:
            return Continued(same.position, WHERE_IT_WAS)
        if isinstance(saved.position, int):
            return Continued(saved.position, f"after {counted(saved.position, 'row')}")
        return Continued(self.start_position(), AT_THE_BEGINNING)

    def is_over(self, position: Position) -> bool:
        """Returns whether ``position`` is at or after the end."""
        return self.end is not None and position >= self.end

    def close(self) -> None:
        """Does nothing: there are no threads and no processes."""
