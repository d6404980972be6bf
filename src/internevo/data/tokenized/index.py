"""A folder tree of tokenized files as one list of documents, opened from a cached index.

The cache (``.internevo/`` in the folder, or the user's cache folder when that cannot be written) is keyed by names,
sizes and times of all files, so that a change makes a new one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ...errors import DataError
from ..raw.files import walk_files
from .files import Ids, TokenFile, meta_of

VERSION = 1
UNFINISHED = "unfinished.json"
"""Lies in the output of a tokenizing run until it is done."""


@dataclass
class Index:
    """Every document of a dataset, in the order of file names and lines."""

    root: Path
    files: list[str]
    """Paths below ``root``."""
    types: list[str]
    """Dataset types: the sorted names of the folders just below ``root``."""
    file_types: list[int]
    first: npt.NDArray[np.int64]
    """[files + 1]: number of each file's first document."""
    documents: npt.NDArray[np.int64]
    """[documents, 2]: the document's number in its file, and its token count."""
    ends: npt.NDArray[np.int64]
    """[documents]: running sum of the token counts."""

    def __post_init__(self) -> None:
        self._open: dict[int, TokenFile] = {}

    def __len__(self) -> int:
        return len(self.documents)

    @property
    def tokens(self) -> int:
        """Tokens in all documents."""
        return int(self.ends[-1]) if len(self.ends) else 0

    def fingerprint(self) -> str:
        """Says whether two datasets hold the same documents, as far as names and lengths tell."""
        text = json.dumps([VERSION, self.files, len(self), self.tokens])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def file_of(self, document: int) -> int:
        """Number of the file that holds a document."""
        return int(np.searchsorted(self.first, document, side="right")) - 1

    def file(self, number: int) -> TokenFile:
        """A file, opened at its first use."""
        if number not in self._open:
            self._open[number] = TokenFile.open(self.root / self.files[number])
        return self._open[number]

    def read(self, document: int, start: int = 0, stop: int | None = None) -> Ids:
        """Ids of a document, signs included."""
        return self.file(self.file_of(document)).read(int(self.documents[document, 0]), start, stop)

    def name(self, document: int) -> str:
        """Where a document is, for messages."""
        return f"{self.root / self.files[self.file_of(document)]}, document {int(self.documents[document, 0])}"


def open_index(root: Path, min_length: int = 0, min_lengths: dict[str, int] | None = None) -> Index:
    """The index of all ``.bin`` files below ``root``, from the cache when nothing has changed.

    Args:
        root: a folder; or, as Megatron has it, the path of one ``.bin`` without its suffix.
        min_length: shorter documents are left out.
        min_lengths: other minimums for files whose path contains the key; two matches are an error.

    Raises:
        DataError: when there is no file, or one is damaged.
    """
    listing = list_files(root)
    root = root if root.is_dir() else root.parent
    key = hashlib.sha256(json.dumps([VERSION, listing, min_length, min_lengths]).encode()).hexdigest()[:24]
    for cache in _cache_folders(root):
        if (cache / key / "index.json").is_file():
            return _load(root, cache / key)
    parts = [_documents(root / name, minimum(name, min_length, min_lengths)) for name, *_ in listing]
    return _store(root, key, [name for name, *_ in listing], parts)


def list_files(root: Path) -> list[tuple[str, int, int, int, int]]:
    """(path, size, time, size and time of the meta) of each ``.bin``, sorted by path."""
    one = root.with_name(root.name + ".bin")
    if not root.is_dir() and not one.is_file():
        raise DataError(f"{root} is not a folder of tokenized data")
    home, paths = (root, walk_files(root)) if root.is_dir() else (root.parent, [one])
    for folder in (root, root.resolve().parent):
        if (folder / UNFINISHED).is_file():
            raise DataError(f"{folder} is unfinished: give its `internevo tokenize` command again, which goes on from there")
    found = []
    for path in paths:
        if path.suffix == ".bin":
            stat = path.stat()
            try:
                meta = meta_of(path).stat()
            except FileNotFoundError:
                raise DataError(f"{path} has no {path.name}.meta beside it") from None
            found.append((os.path.relpath(path, home), stat.st_size, stat.st_mtime_ns, meta.st_size, meta.st_mtime_ns))
    if not found:
        raise DataError(f"{root} holds no .bin file: make some with `internevo tokenize`")
    return sorted(found)


def minimum(name: str, default: int, overrides: dict[str, int] | None) -> int:
    """The shortest document that is kept of a file."""
    matches = [key for key in overrides or {} if key in name]
    if len(matches) > 1:
        raise DataError(f"data.min_length_dict: both {matches[0]!r} and {matches[1]!r} match {name}")
    return (overrides or {})[matches[0]] if matches else default


def _documents(path: Path, minimum: int) -> npt.NDArray[np.int64]:
    """[documents, 2] of one file: number and token count. Empty documents hold nothing to train on and are left out."""
    counts = TokenFile.open(path).meta[:, 1]
    kept = np.flatnonzero(counts >= max(minimum, 1))
    return np.stack([kept, counts[kept]], axis=1)


def _cache_folders(root: Path) -> list[Path]:
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return [root / ".internevo", home / "internevo" / hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:16]]


def _store(root: Path, key: str, files: list[str], parts: list[npt.NDArray[np.int64]]) -> Index:
    types = sorted({type_of(root, name) for name in files})
    documents = np.concatenate(parts)
    index = Index(
        root, files, types, [types.index(type_of(root, name)) for name in files],
        np.cumsum([0, *(len(p) for p in parts)]), documents, np.cumsum(documents[:, 1]),
    )  # fmt: skip
    for cache in _cache_folders(root):
        try:
            cache.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(dir=cache))
            for name in ("first", "documents", "ends"):
                np.save(temporary / f"{name}.npy", getattr(index, name))
            table = {"files": files, "types": types, "file_types": index.file_types}
            (temporary / "index.json").write_text(json.dumps(table))
            try:
                temporary.rename(cache / key)
            except OSError:  # another process was first
                shutil.rmtree(temporary)
            return index
        except OSError:
            continue  # a cache that cannot be written costs time at the next start and nothing else
    return index


def _load(root: Path, cache: Path) -> Index:
    table = json.loads((cache / "index.json").read_text())
    arrays = [np.load(cache / f"{name}.npy", mmap_mode="r") for name in ("first", "documents", "ends")]
    return Index(root, table["files"], table["types"], table["file_types"], *arrays)


def type_of(root: Path, name: str) -> str:
    """Name of the folder just below the root; the root's own for files directly in it."""
    parts = Path(name).parts
    return parts[0] if len(parts) > 1 else root.resolve().name
