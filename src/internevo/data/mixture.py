"""A source that mixes the rows of several sources in given shares."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

from ..errors import DataError
from .rows import Row
from .source import AT_THE_BEGINNING, Continued, NextRows, Position, Saved, SingleSource


@dataclass(frozen=True)
class Part:
    """One of the sources of a mixture."""

    name: str
    source: SingleSource
    weight: float
    """Its share of the rows, relative to the weights of the other parts."""


class Mixture:
    """Rows of several parts, in proportion to their weights. When a part has ended, the others take its share.

    The next row is chosen by stride scheduling (Waldspurger and Weihl 1995): each part has a *pass*, which grows by 1 / weight
    with each of its rows, and the part with the smallest pass is next. So after any number of rows, each part is within one row
    of its share. A position is {name: [position, pass, fingerprint]}, with an entry for each part. The pass is None if the part
    has ended, or is new.
    """

    def __init__(self, parts: list[Part]) -> None:
        self.parts = parts
        self.types = [part.name for part in parts]
        self.seq_len = parts[0].source.seq_len
        self.fingerprints = [part.source.fingerprint() for part in parts]  # computed once: of many files it takes long

    def fingerprint(self) -> str:
        """Returns a hash of the fingerprints of all parts. It does not depend on the weights, which may change between runs."""
        text = json.dumps([list(pair) for pair in zip(self.types, self.fingerprints, strict=True)])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def start_position(self) -> Position:
        """Returns the position before the first row of each part."""
        return self._position([part.source.start_position() for part in self.parts], [1 / part.weight for part in self.parts])

    def _position(self, positions: Sequence[Position], passes: Sequence[float | None]) -> Position:
        entries = zip(self.types, positions, passes, self.fingerprints, strict=True)
        return {name: [position, pass_, fingerprint] for name, position, pass_, fingerprint in entries}

    def _passes(self, position: Position) -> list[float | None]:
        """Returns the pass of each part at a position; None if it has ended.

        Weights and epochs may have changed since the position was saved. A part that is new, or has more epochs or a greater
        weight than before, takes its share of the rows from now on: its pass is at most one of its rows above the smallest.
        """
        passes: list[float | None] = []
        for part in self.parts:
            at, pass_ = position[part.name][:2]
            if pass_ is None and not part.source.is_over(at):
                pass_ = math.inf  # it begins, or goes on
            passes.append(pass_)
        smallest = min((pass_ for pass_ in passes if pass_ is not None and pass_ < math.inf), default=0.0)
        latest = [smallest + 1 / part.weight for part in self.parts]
        return [None if pass_ is None else min(pass_, last) for pass_, last in zip(passes, latest, strict=True)]

    def next_rows(self, position: Position, count: int, needed: Sequence[int]) -> NextRows:
        """Returns the ``count`` rows after ``position``; see ``Source``.

        Raises:
            DataError: if all parts have ended.
        """
        positions = [position[part.name][0] for part in self.parts]
        passes = self._passes(position)
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
        return NextRows([rows[n] for n in needed], count, self._position(positions, passes), skipped)

    def _assign_rows(self, passes: list[float | None], rows: list[int]) -> list[list[int]]:
        """Decides which part each row comes from. Returns the rows of each part, and updates ``passes``."""
        assigned: list[list[int]] = [[] for _ in self.parts]
        for row in rows:
            _, number = min((pass_, n) for n, pass_ in enumerate(passes) if pass_ is not None)
            assigned[number].append(row)
            passes[number] += 1 / self.parts[number].weight  # type: ignore[operator]
        return assigned

    def continue_from(self, saved: Saved) -> Continued:
        """Returns a position at which parts that are not new continue, each as its source says, also if the old source was one
        of them alone."""
        old, found = saved.parts() or {"": saved}, self._find_parts(saved)
        passes = {name: saved.position[name][1] for name in saved.parts()}
        new = f"{AT_THE_BEGINNING} of what is new"
        continued = [
            part.source.continue_from(old[found[part.name]])
            if part.name in found
            else Continued(part.source.start_position(), new)
            for part in self.parts
        ]
        names_by_how: dict[str, list[str]] = {}
        for name, where in zip(self.types, continued, strict=True):
            names_by_how.setdefault(where.how, []).append(name)
        told = ", ".join(f"{how} ({', '.join(names)})" for how, names in names_by_how.items())
        gone = [name for name in saved.parts() if name not in found.values()]
        told += f"; no longer used: {', '.join(gone)}" if gone else ""
        after = self._position([c.position for c in continued], [passes.get(found.get(name, "")) for name in self.types])
        return Continued(after, told)

    def _find_parts(self, saved: Saved) -> dict[str, str]:
        """Returns the name of each part that is not new -> its name in ``saved``, which is "" if that is no mixture.

        It is the part with the same name and data, or else the same data, or else the same name.
        """
        left, found = saved.parts() or {"": saved}, dict[str, str]()

        def is_same(part: Part, old: Saved) -> bool:
            return old.fingerprint is not None and part.source.shares_positions(old.fingerprint)

        rules: list[Callable[[Part, str, Saved], bool]] = [
            lambda part, name, old: name == part.name and is_same(part, old),
            lambda part, name, old: is_same(part, old),
            lambda part, name, old: name == part.name,
        ]
        for rule, part in product(rules, self.parts):
            names = [name for name, old in left.items() if part.name not in found and rule(part, name, old)]
            if names:
                found[part.name] = names[0]
                del left[names[0]]
        return found

    def close(self) -> None:
        """Closes the sources of all parts."""
        for part in self.parts:
            part.source.close()
