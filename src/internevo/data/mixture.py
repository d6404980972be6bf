"""Several sources in given shares, mixed row by row."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import DataError
from .rows import Row
from .source import Place, Source, Taken


@dataclass(frozen=True)
class Part:
    """A source of a mixture."""

    name: str
    source: Source
    weight: float


class Mixture:
    """Rows of the parts, in proportion to their weights; a part that has ended leaves its share to the others.

    Stride scheduling (Waldspurger and Weihl 1995): every part has a pass, which grows by 1 / weight with each row that it
    gives, and the smallest pass is next. After any number of rows each part is within a row of its share. A place holds the
    parts' places and passes.
    """

    def __init__(self, parts: list[Part]) -> None:
        self.parts = parts
        self.types = [part.name for part in parts]
        self.seq_len = parts[0].source.seq_len

    def fingerprint(self) -> str:
        """Of all parts; the weights may change between runs."""
        text = json.dumps([[part.name, part.source.fingerprint()] for part in self.parts])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def start(self) -> Place:
        """By name: [place, pass]; the pass of a part that has ended is None."""
        return {part.name: [part.source.start(), 1 / part.weight] for part in self.parts}

    def take(self, place: Place, count: int, mine: Sequence[int]) -> Taken:
        """
        Raises:
            DataError: when all parts have ended.
        """
        places = [place[part.name][0] for part in self.parts]
        passes: list[float | None] = [place[part.name][1] for part in self.parts]
        bad: list[str] = []
        rows: dict[int, Row] = {}
        missing = list(range(count))
        wanted = set(mine)
        while missing:
            if all(turn is None for turn in passes):
                raise DataError("every source of data.mixture has ended: raise their epochs, or train fewer steps")
            dealt = self._deal(passes, missing)
            missing = []
            for number, numbers in enumerate(dealt):
                if passes[number] is None:
                    continue  # an ended stream would make its last block again to give nothing
                asked = [n for n, row in enumerate(numbers) if row in wanted]
                taken = self.parts[number].source.take(places[number], len(numbers), asked)
                places[number] = taken.place
                bad += taken.bad
                for n, row in zip(asked, taken.rows, strict=False):
                    row.types[:] = number
                    rows[numbers[n]] = row
                if taken.count < len(numbers):
                    missing += numbers[taken.count :]
                    passes[number] = None
            missing.sort()
        behind = {part.name: [at, turn] for part, at, turn in zip(self.parts, places, passes, strict=True)}
        return Taken([rows[n] for n in mine], count, behind, bad)

    def _deal(self, passes: list[float | None], rows: list[int]) -> list[list[int]]:
        """Which part gives each row; passes go on."""
        dealt: list[list[int]] = [[] for _ in self.parts]
        for row in rows:
            _, number = min((turn, n) for n, turn in enumerate(passes) if turn is not None)
            dealt[number].append(row)
            passes[number] += 1 / self.parts[number].weight  # type: ignore[operator]
        return dealt

    def after_change(self, place: Place) -> Place:
        """Parts that are still there go on; new ones begin level with them."""
        old = place if isinstance(place, dict) else {}
        level = min((turn for _, turn in old.values() if turn is not None), default=0.0)
        return {
            part.name: [part.source.after_change(old[part.name][0]), old[part.name][1]]
            if part.name in old
            else [part.source.start(), level + 1 / part.weight]
            for part in self.parts
        }

    def close(self) -> None:
        """Ends all sources."""
        for part in self.parts:
            part.source.close()
