"""Where the rows of a step come from: one after another, from a place on that a checkpoint can hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from ..errors import DataError
from .order import Order
from .rows import Row, Rows, empty_row

Place = Any
"""JSON values."""


@dataclass
class Taken:
    """The next rows of a source."""

    rows: list[Row]
    """Those that were asked for."""
    count: int
    """How many there were in all: fewer than wanted when the source has ended."""
    place: Place
    """Behind them."""
    bad: list[str] = field(default_factory=list)
    """What could not be read and was left out on this rank."""


class Source(Protocol):
    """Rows in an order that follows from the seed and the data, the same on every rank."""

    seq_len: int
    types: list[str]

    def fingerprint(self) -> str:
        """Changes when the rows do."""

    def start(self) -> Place:
        """The place before the first row."""

    def take(self, place: Place, count: int, mine: Sequence[int]) -> Taken:
        """The ``count`` rows behind ``place``; of these, only those at ``mine`` (0 to count - 1) are made."""

    def after_change(self, place: Place) -> Place:
        """Where to go on with other data than ``place`` was made with."""

    def close(self) -> None:
        """Ends what works in the background."""


class Shuffled:
    """Numbered rows in random order, each once per epoch. A place is the number of rows before it."""

    def __init__(self, rows: Rows, seed: int, skip_bad: bool = False, epochs: float | None = None) -> None:
        """
        Args:
            skip_bad: a row that cannot be read is replaced by an empty one.
            epochs: how many there are; None: no end.
        """
        self.rows, self.skip_bad = rows, skip_bad
        self.order = Order(len(rows), seed)
        self.end = None if epochs is None else int(epochs * len(rows))
        self.seq_len, self.types, self.fingerprint = rows.seq_len, rows.types, rows.fingerprint

    def start(self) -> int:
        """No rows."""
        return 0

    def take(self, place: Place, count: int, mine: Sequence[int]) -> Taken:
        """Rows ``place`` to ``place + count`` of the order."""
        if self.end is not None:
            count = max(0, min(count, self.end - place))
        bad: list[str] = []
        numbers = self.order(place + np.array([n for n in mine if n < count], np.int64))
        rows = [self._row(int(number), bad) for number in numbers]
        return Taken(rows, count, place + count, bad)

    def _row(self, number: int, bad: list[str]) -> Row:
        try:
            return self.rows[number]
        except DataError as error:
            if not self.skip_bad:
                raise
            bad.append(f"row {number}: {error}")
            return empty_row(self.seq_len)

    def after_change(self, place: Place) -> int:
        """The same number of rows."""
        return place if isinstance(place, int) else 0

    def close(self) -> None:
        """Nothing works in the background."""
