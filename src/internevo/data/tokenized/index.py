"""The index of tokenized data: the documents of all files in a folder as one list.

The index is cached in ``.internevo/`` in the folder, or in the user's cache folder if that cannot be written. The key of the
cache is a hash of the names, sizes and times of all files, so that the index is made again when a file changes. It is also made
again if the cache is damaged, which a checksum tells.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import DataError, UsageError
from ...storage.folders import put_in_place, temporary
from ...storage.jsonfile import read_object, write_json
from ..raw.files import sample_content, walk_files
from .files import Ids, TokenFile, meta_path

VERSION = 2
ARRAYS = ("first", "documents", "ends")
"""The fields of ``Index`` that the cache has as NumPy files."""
WORK = ".tokenizing"
"""A folder in the output folder of ``internevo tokenize`` until the command is done. The new data is in it."""
UNFINISHED = "unfinished.json"
"""A file in ``WORK``: how far the command has come."""
REPLACING = "replacing.json"
"""A file in ``WORK`` while new data replaces old data."""
RAW = "make tokenized data with `internevo tokenize` (training also reads raw data, with data.type = 'streaming')"
"""What to do with a path that has no tokenized data."""


@dataclass
class Index:
    """All documents of a dataset, in the order of the file names and of the documents in each file."""

    root: Path
    files: list[str]
    """The ``.bin`` files, relative to ``root``."""
    types: list[str]
    """The names of the dataset types, sorted: the folders directly below ``root``."""
    file_types: list[int]
    """The type of each file, as its number in ``types``."""
    first: npt.NDArray[np.int64]
    """[files + 1]: the number of each file's first document; last, the number of all documents."""
    documents: npt.NDArray[np.int64]
    """[documents, 2]: each document's number in its file, and its token count."""
    ends: npt.NDArray[np.int64]
    """[documents]: the cumulative sum of the token counts."""
    content: str
    """A hash of the token counts of all documents, and of samples of their ids."""

    def __post_init__(self) -> None:
        self._open: dict[int, TokenFile] = {}

    def __len__(self) -> int:
        return len(self.documents)

    @property
    def tokens(self) -> int:
        """The number of tokens in all documents."""
        return int(self.ends[-1]) if len(self.ends) else 0

    def fingerprint(self) -> str:
        """Returns a hash of the file names and of the content. It changes when the documents or their order do.

        The ids of large data are sampled (see ``sample_content``), so a few changed ids may go unnoticed.
        """
        text = json.dumps([VERSION, self.files, self.content])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def file_of(self, document: int) -> int:
        """Returns the number of the file that contains a document."""
        return int(np.searchsorted(self.first, document, side="right")) - 1

    def file(self, number: int) -> TokenFile:
        """Returns a file by its number; it is opened when it is first used."""
        if number not in self._open:
            self._open[number] = TokenFile.open(self.root / self.files[number])
        return self._open[number]

    def read(self, document: int, start: int = 0, stop: int | None = None) -> Ids:
        """Returns the signed ids ``start`` to ``stop`` of a document (by default all of them)."""
        return self.file(self.file_of(document)).read(int(self.documents[document, 0]), start, stop)

    def location(self, document: int) -> str:
        """Returns the file of a document and its number in the file, for messages."""
        return f"{self.root / self.files[self.file_of(document)]}, document {int(self.documents[document, 0])}"


def open_index(root: Path, min_length: int = 0, min_lengths: dict[str, int] | None = None) -> Index:
    """Opens the index of all ``.bin`` files below ``root``: from the cache if no file has changed, else from the files.

    Args:
        root: a folder; or the path of one ``.bin`` file without its suffix, as in Megatron-LM.
        min_length: documents with fewer tokens are left out.
        min_lengths: other values of ``min_length`` for files whose path contains the key. Two matching keys are an error.

    Raises:
        DataError: if there is no ``.bin`` file, or one is damaged.
    """
    listing = list_files(root)
    root = root if root.is_dir() else root.parent
    key = hashlib.sha256(json.dumps([VERSION, listing, min_length, min_lengths]).encode()).hexdigest()[:24]
    for cache in _cache_folders(root):
        if (index := _load(root, cache / key)) is not None:
            return index
    parts = [_documents(root / name, minimum_length(name, min_length, min_lengths)) for name, *_ in listing]
    return _store(root, key, [name for name, *_ in listing], parts)


def list_files(root: Path) -> list[tuple[str, int, int, int, int]]:
    """Returns (path, size, time, size of the meta, time of the meta) of each ``.bin`` file, sorted by path.

    Paths are relative to ``root``; sizes are in bytes, times in nanoseconds.

    Raises:
        DataError: if there is no ``.bin`` file, one has no ``.meta``, or ``internevo tokenize`` has not finished writing them.
    """
    _check_finished(root, REPLACING)
    single = root.parent / (root.name + ".bin")
    if not root.is_dir() and not single.is_file():
        _check_finished(root)
        advice = ""
        if root.suffix == ".bin":
            advice = ": leave the suffix out"
        elif root.is_file():
            advice = f": {RAW}"
        raise DataError(f"{root} is neither a folder of tokenized data nor the path of a .bin file without its suffix{advice}")
    home, paths = (root, walk_files(root)) if root.is_dir() else (root.parent, [single])
    found = []
    for path in paths:
        if path.suffix == ".bin":
            stat = path.stat()
            try:
                meta = meta_path(path).stat()
            except FileNotFoundError:
                raise DataError(f"{path} has no {path.name}.meta next to it") from None
            found.append((os.path.relpath(path, home), stat.st_size, stat.st_mtime_ns, meta.st_size, meta.st_mtime_ns))
    if not found:
        _check_finished(root)
        raise DataError(f"{root} contains no .bin file: {RAW}")
    return sorted(found)


def _check_finished(root: Path, marker: str = "") -> None:
    """Raises an error if there is a ``WORK`` with the file ``marker`` in ``root`` or a folder above it.

    ``WORK`` alone does not mean that data is incomplete: the complete data of an earlier command stays until it is replaced.
    """
    for folder in (root, *root.resolve().parents[:2]):
        if (folder / WORK / marker).exists():
            raise DataError(
                f"{folder} is unfinished: run its `internevo tokenize` command again, which continues where it stopped"
            )


def minimum_length(name: str, default: int, overrides: dict[str, int] | None) -> int:
    """Returns the smallest number of tokens of the documents that are kept of a file.

    Args:
        name: the path of the file below the dataset's folder.
        default: the value if no key of ``overrides`` is in ``name``.
        overrides: ``data.min_length_dict``.

    Raises:
        DataError: if two keys match.
    """
    matches = [key for key in overrides or {} if key in name]
    if len(matches) > 1:
        raise DataError(
            f"data.min_length_dict: both {matches[0]!r} and {matches[1]!r} match {name}; only one key may match a file"
        )
    return (overrides or {})[matches[0]] if matches else default


def _documents(path: Path, min_length: int) -> npt.NDArray[np.int64]:
    """Returns the rows of ``Index.documents`` for one file. Empty documents are left out."""
    counts = TokenFile.open(path).meta[:, 1]
    kept = np.flatnonzero(counts >= max(min_length, 1))
    return np.stack([kept, counts[kept]], axis=1)


def _cache_folders(root: Path) -> list[Path]:
    """Returns the folders that may have the cache, in the order in which they are tried."""
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    name = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:16]
    # In a container, a process may have neither HOME nor a user. Then "~" stays in the path.
    return [root / ".internevo", *([Path(caches, "internevo", name)] if os.path.isabs(caches) else [])]


def remove_cache(root: Path) -> None:
    """Removes all indexes from the cache in ``root``."""
    for path in (root / ".internevo").glob("*"):
        if re.fullmatch("[0-9a-f]{24}", path.name):
            shutil.rmtree(path, ignore_errors=True)


def _store(root: Path, key: str, files: list[str], parts: list[npt.NDArray[np.int64]]) -> Index:
    """Makes the index from the documents of each file, and writes it to the cache."""
    types = sorted({dataset_type(root, name) for name in files})
    documents = np.concatenate(parts)
    samples = sample_content([root / name for name in files])
    index = Index(
        root, files, types, [types.index(dataset_type(root, name)) for name in files],
        np.cumsum([0, *(len(p) for p in parts)]), documents, np.cumsum(documents[:, 1]),
        hashlib.sha256(samples.encode() + documents.tobytes()).hexdigest(),
    )  # fmt: skip
    table = {"files": files, "types": types, "file_types": index.file_types, "content": index.content}
    for cache in _cache_folders(root):
        try:
            with temporary(cache / key) as folder:
                for name in ARRAYS:
                    np.save(folder / f"{name}.npy", getattr(index, name))
                write_json(folder / "index.json", {**table, "checksum": _checksum(folder, table)})
                put_in_place(folder, cache / key)
            return index
        except OSError:
            continue  # without a cache, only the next start takes longer
    return index


def _load(root: Path, cache: Path) -> Index | None:
    """Reads the index from the cache. Returns None if it is not there or damaged."""
    try:
        table = read_object(cache / "index.json")
        if table.pop("checksum") != _checksum(cache, table):
            return None
        arrays = {name: np.load(cache / f"{name}.npy", mmap_mode="r") for name in ARRAYS}
        return Index(root, **table, **arrays)
    except (OSError, UsageError, KeyError):
        return None


def _checksum(cache: Path, table: dict[str, Any]) -> int:
    """Returns a checksum of the arrays in a folder, and of the other fields of the index."""
    checksum = zlib.crc32(json.dumps(table).encode())
    for name in ARRAYS:
        with open(cache / f"{name}.npy", "rb") as file:
            while piece := file.read(1 << 24):
                checksum = zlib.crc32(piece, checksum)
    return checksum


def dataset_type(root: Path, name: str) -> str:
    """Returns the dataset type of a file: the name of the folder directly below ``root`` that it is in, or else of ``root``."""
    parts = Path(name).parts
    return parts[0] if len(parts) > 1 else root.resolve().name
