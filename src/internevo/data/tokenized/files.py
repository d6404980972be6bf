"""The tokenized format: ``NAME.bin`` with ``NAME.bin.meta`` beside it.

``.bin.meta``: a NumPy ``.npy`` array [documents, 2] of each document's byte offset and token count. ``.bin`` is either

- JSON lines, ``{"tokens": [ids]}``, as InternEvo writes them; or
- raw little-endian ids, uint16 or int32, the compact form that new data is written in.

Megatron's ``NAME.bin`` with ``NAME.idx`` is read as well.

A negative id means: train on it as context, but do not predict it. Its token is its absolute value; since 0 has no sign,
``MASKED_ZERO`` stands for a masked token 0.
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
from .megatron import read_index

MASKED_ZERO = -(2**31)
Ids = npt.NDArray[np.int64]


@dataclass
class TokenFile:
    """One ``.bin`` and its ``.meta``, opened by memory map and checked against each other."""

    path: Path
    meta: npt.NDArray[np.integer]
    """[documents, 2]: byte offset, token count."""
    itemsize: int
    """Bytes per id; 0 for JSON lines."""
    bytes: npt.NDArray[np.uint8]

    @classmethod
    def open(cls, path: Path) -> TokenFile:
        """Opens ``path`` and its ``.meta`` (or ``.idx``, of a Megatron dataset).

        Raises:
            DataError: when one is missing, truncated, or does not fit the other; with file and position.
        """
        size = path.stat().st_size
        content = np.memmap(path, dtype=np.uint8, mode="r") if size else np.empty(0, np.uint8)
        meta: npt.NDArray[np.integer]
        if meta_of(path).suffix == ".idx":
            meta, itemsize = read_index(meta_of(path))
        else:
            meta = read_meta(path)
            itemsize = _itemsize(path, meta, content)
        file = cls(path, meta, itemsize, content)
        file._check(size)
        return file

    @property
    def dtype(self) -> np.dtype:
        """Of the ids of a binary file."""
        return np.dtype("<u2") if self.itemsize == 2 else np.dtype("<i4")

    def _check(self, size: int) -> None:
        offsets, counts = self.meta[:, 0], self.meta[:, 1]
        if len(self.meta) == 0:
            return
        if (counts < 0).any() or (np.diff(offsets) < 0).any() or offsets[0] < 0:
            bad = int(np.argmax((counts < 0) | np.r_[False, np.diff(offsets) < 0]))
            raise DataError(f"{meta_of(self.path)}, document {bad}: offset {offsets[bad]}, count {counts[bad]} make no sense")
        ends = offsets + counts * max(self.itemsize, 1)
        if ends[-1] > size:
            bad = int(np.argmax(ends > size))
            raise DataError(
                f"{self.path} is truncated: it ends at byte {size}, and document {bad} of {len(self.meta)} "
                f"(byte {offsets[bad]}, {counts[bad]} tokens) goes on behind it"
            )
        if self.itemsize and ends[-1] != size:
            raise DataError(f"{meta_of(self.path)} does not fit: it describes {ends[-1]} bytes, and the file has {size}")
        if not self.itemsize:
            self.read(len(self.meta) - 1)

    def read(self, document: int, start: int = 0, stop: int | None = None) -> Ids:
        """Ids ``start`` to ``stop`` of a document, signs included.

        Raises:
            DataError: when the line is no JSON or has another number of tokens than the meta says.
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
            raise DataError(f"{where} has {array.size} tokens, and its .meta says {count}")
        return array[start:stop]


def meta_of(path: Path) -> Path:
    """The file beside a ``.bin`` that says where its documents are: ``NAME.bin.meta``, or ``NAME.idx`` of Megatron."""
    meta, megatron = path.with_name(path.name + ".meta"), path.with_suffix(".idx")
    return megatron if megatron.is_file() and not meta.is_file() else meta


def read_meta(path: Path) -> npt.NDArray[np.integer]:
    """The ``.meta`` of a ``.bin`` as int64 [documents, 2]. InternEvo's int32 is read too, overflowed offsets repaired."""
    file = path.with_name(path.name + ".meta")
    if not file.is_file():
        raise DataError(f"{path} has no {file.name} beside it")
    try:
        meta = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{file} is not a NumPy array: {error}") from error
    if meta.ndim != 2 or meta.shape[1] < 2 or not np.issubdtype(meta.dtype, np.integer):
        raise DataError(f"{file} has shape {meta.shape} and type {meta.dtype}; it must be integers [documents, 2]")
    columns = np.stack([meta[:, 0], meta[:, -1]], axis=1)  # InternEvo reads the first and the last column
    if meta.dtype == np.int32 and len(meta):
        # int32 offsets wrap around at 2 GiB; they only grow, so each step down is one lap of 2^32.
        laps = np.r_[0, np.cumsum(np.diff(columns[:, 0].astype(np.int64)) < 0)]
        columns = columns.astype(np.int64)
        columns[:, 0] += laps * 2**32
    return columns.astype(np.int64, copy=False)


def _itemsize(path: Path, meta: npt.NDArray[np.integer], content: npt.NDArray[np.uint8]) -> int:
    """0 for JSON lines, else 2 or 4.

    JSON lines begin with '{' and a quote or blank, which as the beginning of int32 ids would be an id of more than half a
    billion; as uint16 ids it is told from JSON by what the first document parses to.
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
                return 0  # a damaged JSON file, which read() will name
    total = int(meta[:, 1].sum())
    fitting = [size for size in (2, 4) if np.array_equal(np.diff(meta[:, 0]), meta[:-1, 1] * size)]
    if len(fitting) == 1 and len(meta) > 1:
        return fitting[0]  # also of a file that was cut off
    for itemsize in fitting:  # one document, or all before the last are empty
        if len(content) == total * itemsize:
            return itemsize
    raise DataError(f"{path}.meta does not fit its .bin: the offsets are those of neither JSON lines nor uint16 nor int32 ids")


class TokenWriter:
    """Writes one ``.bin`` and ``.meta`` in the compact form, document by document; both appear when it is closed.

    Until then ids and counts lie in two ``.tmp`` files, from which a killed run goes on.
    """

    def __init__(self, path: Path, vocab_size: int | None = None, tokens: int = 0, documents: int = 0) -> None:
        """
        Args:
            vocab_size: up to 65,536 allows two bytes per id, as long as no id is masked.
            tokens: that an earlier writer of ``path`` left behind, in so many ``documents``; what it wrote behind them is cut
                off.
        """
        self.path = path
        self.dtype = np.dtype("<u2") if vocab_size is not None and vocab_size <= 2**16 else np.dtype("<i4")
        self.tokens, self.documents = tokens, documents
        path.parent.mkdir(parents=True, exist_ok=True)
        if documents and path.is_file():  # closed, and killed before that was noted
            read_meta(path)[:, 1].astype("<i8").tofile(self._unfinished("counts"))
            path.rename(self._unfinished("bin"))
        self._ids = self._open("bin", tokens * self.dtype.itemsize)
        self._counts = self._open("counts", documents * 8)

    def _unfinished(self, what: str) -> Path:
        return self.path.with_name(f"{self.path.stem}.{what}.tmp")

    def _open(self, what: str, size: int) -> BinaryIO:
        file = open(self._unfinished(what), "r+b" if size else "wb")
        file.truncate(size)
        file.seek(size)
        return file

    def write(self, ids: npt.NDArray[np.integer], counts: npt.NDArray[np.integer]) -> None:
        """Appends documents of ``counts`` tokens each, whose ids stand one after another in ``ids``."""
        self._ids.write(np.ascontiguousarray(ids, dtype=self.dtype).tobytes())
        self._counts.write(np.ascontiguousarray(counts, dtype="<i8").tobytes())
        self.tokens += len(ids)
        self.documents += len(counts)

    def flush(self) -> None:
        """All that was written is on the disk when this returns."""
        for file in (self._ids, self._counts):
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        """Writes the meta and gives the ``.bin`` its name."""
        self._ids.close()
        self._counts.close()
        counts = np.fromfile(self._unfinished("counts"), "<i8")
        offsets = np.r_[0, np.cumsum(counts)[:-1]] if len(counts) else counts
        meta = np.stack([offsets * self.dtype.itemsize, counts], axis=1).astype(np.int64)
        with open(self.path.with_name(self.path.name + ".meta"), "wb") as file:
            np.save(file, meta)
        self._unfinished("bin").replace(self.path)
        self._unfinished("counts").unlink()
