"""Which rows of which tensor on disk are which rows of which parameter.

Every family's layout on disk is made of whole rows: q, k and v in one tensor are rows of it, and the tensors of single experts
are rows of one parameter. The rows of a tensor are those of its view [everything but the last axis, last axis]; of a vector,
its elements (as in ``storage.tensors``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass


def rows_of(shape: Sequence[int]) -> int:
    """Number of rows."""
    return math.prod(shape[:-1]) if len(shape) > 1 else math.prod(shape)


@dataclass(frozen=True)
class Piece:
    """Rows of a tensor on disk; by default all of them."""

    disk: str
    start: int = 0
    count: int | None = None


Names = dict[str, list[Piece]]
"""Parameter -> the pieces that it is made of, in order."""


@dataclass(frozen=True)
class Span:
    """Rows that a parameter and a tensor on disk have in common."""

    parameter: str
    row: int
    disk: str
    disk_row: int
    count: int


class Naming:
    """A family's names on disk for a model of given shapes."""

    def __init__(self, names: Names, shapes: Mapping[str, Sequence[int]]) -> None:
        """``names`` of the parameters in ``shapes``, both in the same order."""
        assert names.keys() == shapes.keys(), sorted(names.keys() ^ shapes.keys())
        self.by_parameter: dict[str, list[Span]] = {}
        self.by_disk: dict[str, list[Span]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Of the tensors on disk."""
        for parameter, pieces in names.items():
            rows, row = rows_of(shapes[parameter]), 0
            for piece in pieces:
                count = piece.count if piece.count is not None else rows // len(pieces)
                span = Span(parameter, row, piece.disk, piece.start, count)
                self.by_parameter.setdefault(parameter, []).append(span)
                self.by_disk.setdefault(piece.disk, []).append(span)
                row += count
            assert row == rows, f"{parameter} has {rows} rows, and its pieces {row}"
        for disk, spans in self.by_disk.items():
            spans.sort(key=lambda span: span.disk_row)
            shape = shapes[spans[0].parameter]
            columns = tuple(shape[-1:]) if len(shape) > 1 else ()
            self.shapes[disk] = (sum(span.count for span in spans), *columns)


def overlap(spans: list[Span], start: int, count: int) -> Iterator[tuple[Span, int, int]]:
    """(span, first row within it, number of rows) that make up a parameter's rows ``start`` to ``start + count``."""
    for span in spans:
        a, b = max(start, span.row), min(start + count, span.row + span.count)
        if b > a:
            yield span, a - span.row, b - a
