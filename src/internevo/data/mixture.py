"""A source that mixes the rows of several sources in given shares."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import DataError
from .rows import Row
from .source import NextRows, Position, Source


@dataclass(frozen=True)
class Part:
    """One of the sources of a mixture."""

    name: str
    source: Source
    weight: float
    """Its share of the rows, relative to the weights of the other parts."""


class Mixture:
    """Rows of several parts, in proportion to their weights. When a part has ended, the others take its share.

    The next row is chosen by stride scheduling (Waldspurger and Weihl 1995): each part has a *pass*, which grows by 1 / weight
    with each of its rows, and the part with the smallest pass is next. So after any number of rows, each part is within one row
    of its share. A position holds the position and the pass of each part.
    """

    def __init__(self, parts: list[Part]) -> None:
        self.parts = parts
        self.types = [part.name for part in parts]
        self.seq_len = parts[0].source.seq_len

    def fingerprint(self) -> str:
        """Returns a hash of the fingerprints of all parts. It does not depend on the weights, which may change between runs."""
        text = json.dumps([[part.name, part.source.fingerprint()] for part in self.parts])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def start_position(self) -> Position:
        """Returns {name: [position, pass]}. Later, the pass of a part that has ended is None."""
        return {part.name: [part.source.start_position(), 1 / part.weight] for part in self.parts}

    def next_rows(self, position: Position, count: int, needed: Sequence[int]) -> NextRows:
        """Returns the ``count`` rows after ``position``; see ``Source``.

        Raises:
            DataError: if all parts have ended.
        """
        positions = [position[part.name][0] for part in self.parts]
        passes: list[float | None] = [position[part.name][1] for part in self.parts]
        skipped: list[str] = []
        rows: dict[int, Row] = {}
        missing = list(range(count))
        wanted = set(needed)
        while missing:
            if all(pass_ is None for pass_ in passes):
                raise DataError(
                    "every source of data.mixture has ended: increase their epochs, or train fewer steps (data.total_steps)"
                )
            assigned = self._assign_rows(passes, missing)
            missing = []
            for number, numbers in enumerate(assigned):
                if passes[number] is None:
                    continue  # a stream that has ended would make its last block again, for no rows
                part_needed = [n for n, row in enumerate(numbers) if row in wanted]
                found = self.parts[number].source.next_rows(positions[number], len(numbers), part_needed)
                positions[number] = found.position
                skipped += found.skipped
                for n, row in zip(part_needed, found.rows, strict=False):
                    row.types[:] = number
                    rows[numbers[n]] = row
                if found.count < len(numbers):
                    missing += numbers[found.count :]
                    passes[number] = None
            missing.sort()
        after = {part.name: [at, pass_] for part, at, pass_ in zip(self.parts, positions, passes, strict=True)}
        return NextRows([rows[n] for n in needed], count, after, skipped)

    def _assign_rows(self, passes: list[float | None], rows: list[int]) -> list[list[int]]:
        """Decides which part each row comes from. Returns the rows of each part, and updates ``passes``."""
        assigned: list[list[int]] = [[] for _ in self.parts]
        for row in rows:
            _, number = min((pass_, n) for n, pass_ in enumerate(passes) if pass_ is not None)
            assigned[number].append(row)
            passes[number] += 1 / self.parts[number].weight  # type: ignore[operator]
        return assigned

    def position_after_change(self, position: Position) -> Position:
        """Returns a position at which parts that remain continue, and new parts start with the smallest pass of the others."""
        old = position if isinstance(position, dict) else {}
        smallest = min((pass_ for _, pass_ in old.values() if pass_ is not None), default=0.0)
        return {
            part.name: [part.source.position_after_change(old[part.name][0]), old[part.name][1]]
            if part.name in old
            else [part.source.start_position(), smallest + 1 / part.weight]
            for part in self.parts
        }

    def close(self) -> None:
        """Closes the sources of all parts."""
        for part in self.parts:
            part.source.close()
