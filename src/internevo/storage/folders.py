"""Folders that appear when they are whole: written under a name of this program's own, and then renamed.

Names beside a folder NAME, by which leftovers of killed processes are known:

| name                 | is                                                                                          |
|----------------------|---------------------------------------------------------------------------------------------|
| ``.NAME.tmp``        | being written, by several processes that must all know the name                             |
| ``.NAME.XXXXXXXX.tmp`` | being written, by one process                                                             |
| ``.NAME.XXXXXXXX.old`` | what had the name before, until the new one has it: it stands in for a NAME that is not there |
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def shared_temporary(folder: Path) -> Path:
    """Where several processes write ``folder``: only for folders that this program alone writes to."""
    return folder.with_name(f".{folder.name}.tmp")


@contextmanager
def temporary(folder: Path) -> Iterator[Path]:
    """A new folder beside ``folder`` for what ``put_in_place`` then gives its name; removed if that does not happen."""
    path = _beside(folder, "tmp")
    path.mkdir(parents=True)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def put_in_place(whole: Path, folder: Path) -> None:
    """Gives ``whole`` the name ``folder``, in place of what has it.

    A process killed at any moment leaves the old or the new one under that name, or the old one standing in for it.
    """
    old = None
    if os.path.lexists(folder):
        old = _beside(folder, "old")
        folder.rename(old)
    whole.rename(folder)
    sync(folder.parent)
    if old is not None:
        _remove(old)


def standing(parent: Path, names: str) -> dict[str, Path]:
    """The folders of ``parent`` whose names fit the pattern ``names``, and those that stand in for one."""
    found = {path.name: path for path in parent.glob("*") if re.fullmatch(names, path.name)}
    for path, name, kind in _leftovers(parent, names):
        if kind == "old":
            found.setdefault(name, path)
    return found


def tidy(parent: Path, names: str) -> None:
    """Removes what killed processes have left of folders whose names fit the pattern ``names``; what stands in for one gets its
    name back. Nobody may be writing there."""
    for path, name, kind in _leftovers(parent, names):
        if kind == "old" and not os.path.lexists(parent / name):
            path.rename(parent / name)
        else:
            _remove(path)


def sync(path: Path) -> None:
    """Makes sure that a file's content, or the names in a folder, are on disk before what depends on them."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not path.is_dir():  # some network file systems refuse it for folders
            raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(descriptor)


def _beside(folder: Path, kind: str) -> Path:
    return folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.{kind}")


def _leftovers(parent: Path, names: str) -> Iterator[tuple[Path, str, str]]:
    """(path, name of the folder that it belongs to, "tmp" or "old")."""
    for path in sorted(parent.glob(".*")):
        match = re.fullmatch(rf"\.(?P<name>{names})(\.[0-9a-f]{{8}})?\.(?P<kind>tmp|old)", path.name)
        if match:
            yield path, match["name"], match["kind"]


def _remove(path: Path) -> None:
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)
