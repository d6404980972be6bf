"""metrics.jsonl, samples.jsonl and events.jsonl. Every step is in them once, even after a run has been resumed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any

from ..storage.jsonfile import to_json
from ..storage.naming import naming
from ..storage.replace import replace_text


class JsonLines:
    """A file of rows, one JSON object per line. It is continued after a step.

    Rows of later steps, which the run writes again, and damaged lines move to NAME.removed, which nobody ever shortens.
    """

    def __init__(self, path: Path, last_step: int) -> None:
        """``last_step``: the last step whose rows are kept, if the file exists; 0: none, not even an evaluation before it."""
        self.path = path
        kept, removed = list[str](), list[bytes]()
        for line, row in _lines(path):
            if row is not None and _is_step(row.get("step")) and 0 < last_step >= row["step"]:
                kept.append(to_json(row) + "\n")  # strict JSON, which older versions did not write
            else:
                removed.append(line + b"\n")
        if removed:
            history = path.with_name(path.name + ".removed")
            with naming(history), open(history, "ab") as file:
                file.writelines(removed)
                file.flush()
                os.fsync(file.fileno())
        replace_text(path, "".join(kept))
        self._file = open(path, "a", encoding="utf-8", buffering=1)

    def write(self, row: dict[str, Any]) -> None:
        """Appends a row. It is in the file when this method returns."""
        with naming(self.path):
            self._file.write(to_json(row) + "\n")

    def close(self) -> None:
        """Closes the file."""
        with naming(self.path):
            self._file.close()


def usable_rows(path: Path, kinds: dict[str, type | UnionType]) -> tuple[list[dict[str, Any]], int]:
    """Reads the rows that have a step, and the keys in ``kinds`` with values of these types. No file: no rows.

    Returns:
        The rows, and the number of lines that are damaged: not JSON, or not an object. A killed process may leave some.
    """
    found = [row for _, row in _lines(path)]
    rows = [row for row in found if row is not None and _is_step(row.get("step"))]
    usable = [row for row in rows if all(isinstance(row.get(key, ...), kind) for key, kind in kinds.items())]
    return usable, found.count(None)


def _is_step(value: object) -> bool:
    """Whether a value of a row can be the number of a step."""
    return isinstance(value, int) and not isinstance(value, bool)


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Yields each line of a file without its end, and the object in it; None if the line is damaged."""
    if not path.is_file():
        return
    with open(path, "rb") as file:
        for line in file:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            yield line.rstrip(b"\r\n"), row if isinstance(row, dict) else None
