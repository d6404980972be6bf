"""Folders that appear only when they are complete: each is written under a temporary name and then renamed.

The temporary names are next to the folder NAME. By them, what killed processes have left is recognised.

| name                   | content                                                                                       |
|------------------------|-----------------------------------------------------------------------------------------------|
| ``.NAME.tmp``          | a new folder that several processes are writing; all of them must know its name               |
| ``.NAME.XXXXXXXX.tmp`` | a new folder that one process is writing                                                      |
| ``.NAME.XXXXXXXX.old`` | the old folder while it is being replaced; if there is no NAME, it is used in place of NAME   |
"""

from __future__ import annotations

import itertools
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ..errors import UsageError


def shared_temporary(folder: Path) -> Path:
    """Returns the name under which several processes write ``folder``. No other program may write to the parent folder."""
    return folder.with_name(f".{folder.name}.tmp")


@contextmanager
def temporary(folder: Path) -> Iterator[Path]:
    """Makes an empty folder next to ``folder``. It is removed at the end, unless ``put_in_place`` has renamed it."""
    path = _temporary_name(folder, "tmp")
    path.mkdir(parents=True)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def target(folder: Path, last: str, replaced: Iterable[str] | None = None, first: str | None = None) -> Iterator[Path]:
    """Makes an empty folder. At the end, unless there was an error, its files are moved to ``folder``.

    A ``folder`` that did not exist appears when it is complete. Other files of one that exists stay as they are.

    Args:
        folder: if it is a link, its target is written, on the target's disk.
        last: name of the file without which ``folder`` is not complete. It is deleted first and moved last.
        replaced: names of the files in ``folder`` that the new ones replace, and which are deleted before. None: ``folder``
            must be empty.
        first: name of a new file that says which files are this program's. It is moved before the others, when those that
            they replace are gone, so that it is never wrong.

    Raises:
        UsageError: if ``folder`` is a file, or cannot be written, or has files that may not be replaced. Nothing is changed.
    """
    folder = folder.resolve()
    check_target(folder, replaced is not None)
    exists = folder.is_dir()
    with ExitStack() as stack:
        try:
            new = stack.enter_context(temporary(folder / "new" if exists else folder))
        except OSError as error:
            raise UsageError(f"{folder} cannot be written: {error.strerror}: {error.filename}") from error
        yield new
        if exists:
            _move_files(new, folder, last, replaced or (), first)
        else:
            new.rename(folder)
            sync(folder.parent)


def check_target(folder: Path, may_have_files: bool = False, advice: str = "give another folder") -> None:
    """Checks that a command may write to ``folder``, before it does any work.

    Args:
        advice: what to do if it is not empty.

    Raises:
        UsageError: if ``folder`` is a file, or cannot be written, or is not empty (unless ``may_have_files``).
    """
    nearest = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not nearest.is_dir():
        raise UsageError(f"{folder} cannot be written: {nearest} is not a folder; give another folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UsageError(f"{folder} cannot be written: you have no permission to write to {nearest}; give another folder")
    if nearest == folder and not may_have_files and (names := os.listdir(folder)):
        raise UsageError(f"{folder} is not empty (it has {min(names)}); {advice}")


def _move_files(new: Path, folder: Path, last: str, replaced: Iterable[str], first: str | None) -> None:
    names = [p.relative_to(new).as_posix() for p in new.rglob("*") if p.is_file()]
    for name in names:
        if (folder / name).is_dir():
            raise UsageError(f"{folder / name} is a folder, and a file of this name is to be written; give another folder")
    for name in dict.fromkeys((last, *replaced)):
        (folder / name).unlink(missing_ok=True)
    for name in sorted(names, key=lambda name: (name == last, name != first, name)):
        (folder / name).parent.mkdir(exist_ok=True)
        (new / name).replace(folder / name)
    sync(folder)


def put_in_place(new: Path, folder: Path) -> None:
    """Renames ``new`` to ``folder``. A ``folder`` that exists is replaced.

    If the process is killed at any moment, ``find_folders`` finds either the old or the new folder under that name.
    """
    old = None
    if os.path.lexists(folder):
        old = _temporary_name(folder, "old")
        folder.rename(old)
    new.rename(folder)
    sync(folder.parent)
    if old is not None:
        _remove(old)


def set_aside(path: Path) -> Path:
    """Renames a file or folder to the first free name of NAME.1, NAME.2, ... Returns the new path."""
    new = next(p for n in itertools.count(1) if not os.path.lexists(p := path.with_name(f"{path.name}.{n}")))
    path.rename(new)
    return new


def find_folders(parent: Path, names: str) -> dict[str, Path]:
    """Finds the folders in ``parent`` whose names match the regular expression ``names``.

    Returns:
        Name -> path. The path has another name if a process was killed while it replaced the folder.
    """
    found = {path.name: path for path in parent.glob("*") if re.fullmatch(names, path.name)}
    for path, name, kind in _leftovers(parent, names):
        if kind == "old":
            found.setdefault(name, path)
    return found


def clean_up(parent: Path, names: str) -> None:
    """Removes temporary folders that killed processes have left. An old folder whose replacement never came gets its name back.

    No process may be writing in ``parent``.

    Args:
        names: regular expression of the names of the folders.
    """
    for path, name, kind in _leftovers(parent, names):
        if kind == "old" and not os.path.lexists(parent / name):
            path.rename(parent / name)
        else:
            _remove(path)


def sync(path: Path) -> None:
    """Waits until a file's content, or the list of names in a folder, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not path.is_dir():  # some network file systems refuse fsync on folders
            raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(descriptor)


def _temporary_name(folder: Path, kind: str) -> Path:
    return folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.{kind}")


def _leftovers(parent: Path, names: str) -> Iterator[tuple[Path, str, str]]:
    """Yields (path, name of the folder that it belongs to, "tmp" or "old") of every temporary folder."""
    for path in sorted(parent.glob(".*")):
        match = re.fullmatch(rf"\.(?P<name>{names})(\.[0-9a-f]{{8}})?\.(?P<kind>tmp|old)", path.name)
        if match:
            yield path, match["name"], match["kind"]


def _remove(path: Path) -> None:
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)
