"""Folders whose files this program has marked as its own, so that it replaces no others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...errors import UsageError
from ...storage.folders import target
from ...storage.jsonfile import read_object, write_json

MARK = "internevo.json"
"""Name of the file with the names and sizes of the files that this program has written."""


@contextmanager
def owned_target(folder: Path, last: str, names: Iterable[str], overwrite: bool) -> Iterator[Path]:
    """Makes an empty folder. At the end, its files are moved to ``folder``, and marked as this program's.

    If the process is killed while it moves them, every file in ``folder`` is marked, and ``last`` is missing.

    Args:
        last: as in ``target``.
        names: names of files that will be replaced or removed, which are checked before anything is written.
        overwrite: ``folder`` may have files: those that this program has written are replaced, and all others stay.

    Raises:
        UsageError: if a file that would be replaced was not written by this program, or was changed since; or ``folder`` is
            not empty (without ``overwrite``), or cannot be written.
    """
    replaced = _ours(folder, names) if overwrite else []
    with target(folder, last, replaced if overwrite else None, MARK) as new:
        yield new
        written = {path.relative_to(new).as_posix(): path.stat().st_size for path in new.rglob("*") if path.is_file()}
        replaced += _ours(folder, written)
        kept = {name: size for name, size in _marked(folder).items() if name not in replaced and (folder / name).is_file()}
        write_json(new / MARK, {"written_by": "internevo", "files": dict(sorted((kept | written).items()))}, indent=2)


def _ours(folder: Path, names: Iterable[str]) -> list[str]:
    """Returns those of the files that are there; the new ones may replace them.

    Raises:
        UsageError: if one of them was not written by this program, or was changed since.
    """
    there, marked = [name for name in names if (folder / name).is_file()], _marked(folder)
    for name in there:
        if marked.get(name) != (folder / name).stat().st_size:
            why = "was changed after internevo wrote it" if name in marked else "was not written by internevo"
            raise UsageError(f"{folder / name} {why}, so it is not replaced; move it away, or give another folder")
    return there


def _marked(folder: Path) -> dict[str, Any]:
    """Returns name -> size of the files that this program has written to a folder."""
    files = read_object(folder / MARK).get("files") if (folder / MARK).is_file() else None
    return files if isinstance(files, dict) else {}
