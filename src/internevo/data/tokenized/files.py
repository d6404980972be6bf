"""The format of tokenized data: pairs of files ``NAME.bin`` and ``NAME.bin.meta``.

``.bin.meta`` is a NumPy ``.npy`` array [documents, 2]: each document's byte offset and token count. ``.bin`` is either

- JSON lines, ``{"tokens": [ids]}``, as the original InternEvo writes them; or
- the compact form, in which new data is written: only the ids, as little-endian uint16 or int32.

Megatron-LM's ``NAME.bin`` with ``NAME.idx`` is read as well.

The ids are signed. A negative id is a masked token: the model sees it as context, but it is not predicted. The token is the
absolute value of the id; since 0 has no sign, ``MASKED_ZERO`` stands for a masked token 0.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from ...errors import DataError
from ...storage.naming import naming
from ...wording import counted
from .megatron import read_index

MASKED_ZERO = -(2**31)
"""The signed id of a masked token 0."""
Ids = npt.NDArray[np.int64]


@dataclass
class TokenFile:
    """A memory-mapped ``.bin`` file with its ``.meta``; both have been checked against each other."""

    path: Path
    meta: npt.NDArray[np.integer]
    """[documents, 2]: each document's byte offset and token count."""
    itemsize: int
    """Bytes per id; 0 for JSON lines."""
    bytes: npt.NDArray[np.uint8]
    """The content of the ``.bin``."""

    @classmethod
    def open(cls, path: Path) -> TokenFile:
        """Opens a ``.bin`` file and its ``.meta`` (or Megatron's ``.idx``).

        Raises:
            DataError: if one of them is missing or truncated, or they do not match; the message says which file and where.
        """
        size = path.stat().st_size
        content = np.memmap(path, dtype=np.uint8, mode="r") if size else np.empty(0, np.uint8)
        meta: npt.NDArray[np.integer]
        if meta_path(path).suffix == ".idx":
            meta, itemsize = read_index(meta_path(path))
        else:
            meta = read_meta(path)
            itemsize = _detect_itemsize(path, meta, content)
        file = cls(path, meta, itemsize, content)
        file._check(size)
        return file

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the ids in a file of the compact form."""
        return np.dtype("<u2") if self.itemsize == 2 else np.dtype("<i4")

    def _check(self, size: int) -> None:
        offsets, counts = self.meta[:, 0], self.meta[:, 1]
        if len(self.meta) == 0:
            return
        if (counts < 0).any() or (np.diff(offsets) < 0).any() or offsets[0] < 0:
            bad = int(np.argmax((counts < 0) | np.r_[False, np.diff(offsets) < 0]))
            raise DataError(
                f"{meta_path(self.path)}, document {bad}: offset {offsets[bad]} and token count {counts[bad]} are impossible"
            )
        ends = offsets + counts * max(self.itemsize, 1)
        if ends[-1] > size:
            bad = int(np.argmax(ends > size))
            raise DataError(
                f"{self.path} is truncated: it ends at byte {size}, and document {bad} of {len(self.meta)} "
                f"(byte {offsets[bad]}, {counted(counts[bad], 'token')}) ends after that"
            )
        if self.itemsize and ends[-1] != size:
            raise DataError(
                f"{meta_path(self.path)} does not match its .bin: it describes {ends[-1]} bytes, but the .bin has {size}"
            )
        if not self.itemsize:
            self.read(len(self.meta) - 1)

    def read(self, document: int, start: int = 0, stop: int | None = None) -> Ids:
        """Returns the signed ids ``start`` to ``stop`` of a document (by default all of them).

        Raises:
            DataError: if the line is not JSON, or does not have as many tokens as the ``.meta`` says.
        """
        offset, count = (int(v) for v in self.meta[document])
        stop = count if stop is None else min(stop, count)
        if self.itemsize:
            a, b = offset + start * self.itemsize, offset + stop * self.itemsize
            return self.bytes[a:b].view(self.dtype).astype(np.int64)
        end = int(self.meta[document + 1, 0]) if document + 1 < len(self.meta) else len(self.bytes)
        where = f"{self.path}, document {document} (byte {offset})"
        try:
            ids = json.loads(self.bytes[offset:end].tobytes())["tokens"]
            array: Ids = np.array(ids, dtype=np.int64)
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise DataError(f'{where} is not a line {{"tokens": [...]}}: {error}') from error
        if array.shape != (count,):
            raise DataError(f"{where} has {counted(array.size, 'token')}, but its .meta says {count}")
        return array[start:stop]


def meta_path(path: Path) -> Path:
    """Returns the file that says where the documents of a ``.bin`` are: ``NAME.bin.meta``, or Megatron's ``NAME.idx``."""
    meta, megatron = path.with_name(path.name + ".meta"), path.with_suffix(".idx")
    return megatron if megatron.is_file() and not meta.is_file() else meta


def read_meta(path: Path) -> npt.NDArray[np.integer]:
    """Reads the ``.meta`` of a ``.bin``. Returns int64 [documents, 2]: each document's byte offset and token count.

    The original InternEvo's int32 is read too; offsets that overflowed are repaired.

    Raises:
        DataError: if the file is missing or not such an array.
    """
    file = path.with_name(path.name + ".meta")
    if not file.is_file():
        raise DataError(f"{path} has no {file.name} next to it")
    try:
        meta = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{file} is not a NumPy array: {error}") from error
    if meta.ndim != 2 or meta.shape[1] < 2 or not np.issubdtype(meta.dtype, np.integer):
        raise DataError(f"{file} has shape {meta.shape} and type {meta.dtype}; it must be an array of integers [documents, 2]")
    columns = np.stack([meta[:, 0], meta[:, -1]], axis=1)  # as the original InternEvo reads it
    if meta.dtype == np.int32 and len(meta):
        # The offsets increase, so each decrease is an overflow of int32, which is off by 2^32 from there on.
        overflows = np.r_[0, np.cumsum(np.diff(columns[:, 0].astype(np.int64)) < 0)]
        columns = columns.astype(np.int64)
        columns[:, 0] += overflows * 2**32
    return columns.astype(np.int64, copy=False)


def _detect_itemsize(path: Path, meta: npt.NDArray[np.integer], content: npt.NDArray[np.uint8]) -> int:
    """Returns the bytes per id of a ``.bin``: 0 for JSON lines, else 2 or 4.

    Ids may begin with the same byte as a line of JSON, '{'. So a file is taken as JSON lines only if its first document can be
    parsed, or begins with the text of such a line.
    """
    if not len(meta) or not len(content):
        return 4
    first = content[int(meta[0, 0]) : int(meta[1, 0]) if len(meta) > 1 else len(content)]
    if len(first) and first[0] == ord("{"):
        try:
            if "tokens" in json.loads(first.tobytes()):
                return 0
        except ValueError:
            if first[:9].tobytes().replace(b" ", b"").startswith(b'{"token'):
                return 0  # a damaged line of JSON: read() raises an error that says where
    total = int(meta[:, 1].sum())
    possible = [size for size in (2, 4) if np.array_equal(np.diff(meta[:, 0]), meta[:-1, 1] * size)]
    if len(possible) == 1 and len(meta) > 1:
        return possible[0]  # also if the file is truncated
    for itemsize in possible:  # there is one document, or all before the last are empty
        if len(content) == total * itemsize:
            return itemsize
    raise DataError(f"{path}.meta does not match its .bin: its offsets fit neither JSON lines nor uint16 ids nor int32 ids")


class TokenWriter:
    """Writes a ``.bin`` and its ``.meta`` in the compact form; both appear when the writer is closed.

    Until then, ids and token counts are in two ``.tmp`` files, from which a run that was killed can resume.
    """

    def __init__(self, path: Path, vocab_size: int | None = None, tokens: int = 0, documents: int = 0) -> None:
        """Creates the files, or opens those of a run that was killed.

        Args:
            path: the ``.bin`` file.
            vocab_size: if it is at most 65,536, ids take two bytes, and none may be negative (masked). None: four bytes.
            tokens: the number of tokens to keep of what an earlier writer of ``path`` has written.
            documents: the number of documents that these tokens belong to. Everything after them is removed.
        """
        self.path = path
        self.dtype = np.dtype("<u2") if vocab_size is not None and vocab_size <= 2**16 else np.dtype("<i4")
        self.tokens, self.documents = tokens, documents
        path.parent.mkdir(parents=True, exist_ok=True)
        if documents and path.is_file():  # the run was killed after it closed the file, before it saved its progress
            with naming(self._temporary("counts")):
                read_meta(path)[:, 1].astype("<i8").tofile(self._temporary("counts"))
            path.rename(self._temporary("bin"))
        self._ids = self._open("bin", tokens * self.dtype.itemsize)
        self._counts = self._open("counts", documents * 8)

    def _temporary(self, content: str) -> Path:
        return self.path.with_name(f"{self.path.stem}.{content}.tmp")

    def _open(self, content: str, size: int) -> BinaryIO:
        """Opens a temporary file, and keeps its first ``size`` bytes."""
        path = self._temporary(content)
        if size and not (path.is_file() and path.stat().st_size >= size):
            raise DataError(f"{path}, which a run that was killed has left, is damaged: remove {path.parent} and start again")
        file = open(path, "r+b" if size else "wb")
        file.truncate(size)
        file.seek(size)
        return file

    def write(self, ids: npt.NDArray[np.integer], counts: npt.NDArray[np.integer]) -> None:
        """Appends documents.

        Args:
            ids: the signed ids of all documents, concatenated.
            counts: the number of tokens of each document.
        """
        with naming(self.path):
            self._ids.write(np.ascontiguousarray(ids, dtype=self.dtype).tobytes())
            self._counts.write(np.ascontiguousarray(counts, dtype="<i8").tobytes())
        self.tokens += len(ids)
        self.documents += len(counts)

    def flush(self) -> None:
        """Returns when everything that was written is on the disk."""
        with naming(self.path):
            for file in (self._ids, self._counts):
                file.flush()
                os.fsync(file.fileno())

    def close(self) -> None:
        """Writes the ``.meta``, and gives the ``.bin`` its final name."""
        with naming(self.path):
            self._ids.close()
            self._counts.close()
        counts = np.fromfile(self._temporary("counts"), "<i8")
        offsets = np.r_[0, np.cumsum(counts)[:-1]] if len(counts) else counts
        meta = np.stack([offsets * self.dtype.itemsize, counts], axis=1).astype(np.int64)
        path = self.path.with_name(self.path.name + ".meta")
        with naming(path), open(path, "wb") as file:
            np.save(file, meta)
        self._temporary("bin").replace(self.path)
        self._temporary("counts").unlink()
