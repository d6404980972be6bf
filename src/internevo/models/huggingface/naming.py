"""Maps rows of parameters to rows of tensors on disk. The names themselves are in ``families/FAMILY.py``, ``names()``.

In every family, a tensor on disk and a parameter share whole rows. For example, q, k and v may be rows of one tensor on disk,
and the tensors of single experts are rows of one parameter. ``storage.tensors`` says what the rows of a tensor are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass


def row_count(shape: Sequence[int]) -> int:
    """Returns the number of rows of a tensor of ``shape``."""
    return math.prod(shape[:-1]) if len(shape) > 1 else math.prod(shape)


@dataclass(frozen=True)
class DiskRows:
    """Rows of a tensor on disk."""

    disk: str
    """The name of the tensor on disk."""
    start: int = 0
    """The first row."""
    count: int | None = None
    """The number of rows. None: all rows of the tensor."""


Names = dict[str, list[DiskRows]]
"""Parameter -> the rows of tensors on disk that it consists of, in order."""


@dataclass(frozen=True)
class RowMapping:
    """Rows that a parameter and a tensor on disk have in common."""

    parameter: str
    row: int
    """The first of these rows in the parameter."""
    disk: str
    """The name of the tensor on disk."""
    disk_row: int
    """The first of these rows in the tensor on disk."""
    count: int


class Naming:
    """Where the parameters of a model are on disk, in both directions."""

    def __init__(self, names: Names, shapes: Mapping[str, Sequence[int]]) -> None:
        """
        Args:
            names: the family's names on disk.
            shapes: the shapes of the same parameters.
        """
        assert names.keys() == shapes.keys(), sorted(names.keys() ^ shapes.keys())
        self.by_parameter: dict[str, list[RowMapping]] = {}
        self.by_disk: dict[str, list[RowMapping]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        """The shapes of the tensors on disk."""
        for parameter, parts in names.items():
            rows, row = row_count(shapes[parameter]), 0
            for part in parts:
                count = part.count if part.count is not None else rows // len(parts)
                mapping = RowMapping(parameter, row, part.disk, part.start, count)
                self.by_parameter.setdefault(parameter, []).append(mapping)
                self.by_disk.setdefault(part.disk, []).append(mapping)
                row += count
            assert row == rows, f"{parameter} has {rows} rows, but its tensors on disk have {row}"
        for disk, mappings in self.by_disk.items():
            mappings.sort(key=lambda mapping: mapping.disk_row)
            shape = shapes[mappings[0].parameter]
            columns = tuple(shape[-1:]) if len(shape) > 1 else ()
            self.shapes[disk] = (sum(mapping.count for mapping in mappings), *columns)


def overlapping(mappings: list[RowMapping], start: int, count: int) -> Iterator[tuple[RowMapping, int, int]]:
    """Yields (mapping, first row within it, number of rows) for the parameter's rows ``start`` to ``start + count``."""
    for mapping in mappings:
        a, b = max(start, mapping.row), min(start + count, mapping.row + mapping.count)
        if b > a:
            yield mapping, a - mapping.row, b - a
