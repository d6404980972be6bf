"""Marks the files that this program has written to a folder, so that it replaces no others."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ...errors import UsageError
from ...storage.jsonfile import read_object, write_json

MARK = "internevo.json"
"""Name of the file with the names and sizes of the others."""


def mark(folder: Path) -> None:
    """Writes down which files are in a new folder, all of which this program has written."""
    files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
    write_json(folder / MARK, {"written_by": "internevo", "files": files}, indent=2)


def replaceable(folder: Path, names: Iterable[str]) -> list[str]:
    """Returns those of the files that are there; the new ones may replace them.

    Args:
        names: names of files that would be replaced or removed.

    Raises:
        UsageError: if one of them was not written by this program, or was changed since.
    """
    there = [name for name in names if (folder / name).is_file()]
    marked: dict[str, Any] = read_object(folder / MARK).get("files", {}) if there and (folder / MARK).is_file() else {}
    for name in there:
        if marked.get(name) != (folder / name).stat().st_size:
            why = "was changed after internevo wrote it" if name in marked else "was not written by internevo"
            raise UsageError(f"{folder / name} {why}, so it is not replaced; move it away, or give another folder")
    return [*there, *([MARK] if (folder / MARK).is_file() else [])]
