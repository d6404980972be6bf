"""Safetensors files as streams: rows of a tensor are read and written without holding more than those rows.

The format (https://huggingface.co/docs/safetensors): the header's length as 8 bytes, a JSON header of names, dtypes, shapes and
offsets, and the tensors' bytes. Reading is by plain reads: the pages of a memory map would count as this process's memory.

The rows of a tensor are those of its view [everything but the last axis, last axis]; of a vector, its elements.
"""

from __future__ import annotations

import errno
import json
import math
import os
import queue
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
CODES = {dtype: code for code, dtype in DTYPES.items()}
CHUNK_BYTES = 1 << 20
"""Bytes that are read, converted and written at once: few enough to stay in a cache between reading and writing."""


@dataclass(frozen=True)
class Spec:
    """A tensor's shape and dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def rows(self) -> int:
        """Number of rows."""
        return math.prod(self.shape[:-1]) if len(self.shape) > 1 else math.prod(self.shape)

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of one row."""
        return self.shape[-1:] if len(self.shape) > 1 else ()

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def chunks(self, start: int, count: int) -> Iterable[tuple[int, int]]:
        """(first row, number of rows) of parts of at most ``CHUNK_BYTES`` (at least one row)."""
        step = max(1, CHUNK_BYTES // max(1, math.prod(self.row_shape) * self.dtype.itemsize))
        return ((row, min(step, start + count - row)) for row in range(start, start + count, step))


def as_rows(tensor: Tensor) -> Tensor:
    """A tensor's view by rows."""
    return tensor.flatten(0, -2) if tensor.dim() > 1 else tensor


def joint_dtype(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """The dtype of what is joined from parts of these: theirs if it is one, else float32, which holds every value of the
    narrower ones (or float64)."""
    found = set(dtypes)
    if len(found) == 1:
        return found.pop()
    return torch.float64 if torch.float64 in found else torch.float32


@dataclass(frozen=True)
class Place:
    """Rows of a tensor as bytes in an open file."""

    path: Path
    descriptor: int
    offset: int
    nbytes: int
    dtype: torch.dtype
    """Of the values in those bytes."""

    def read(self) -> memoryview:
        """The bytes."""
        data = memoryview(bytearray(self.nbytes))
        _read_into(data, self.path, self.descriptor, self.offset)
        return data


class TensorFile:
    """One safetensors file for reading.

    Raises:
        UsageError: naming the file, when it is not one or is cut short.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.specs: dict[str, Spec] = {}
        self._starts: dict[str, int] = {}
        try:
            self._file = open(path, "rb", buffering=0)
            self._read_header()
        except OSError as error:
            raise UsageError(f"{path} cannot be read: {error}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{path} is not a safetensors file: {error}") from error

    def _read_header(self) -> None:
        size = os.fstat(self._file.fileno()).st_size
        length = int.from_bytes(self._bytes(0, min(8, size)), "little")
        if not 2 <= length <= size - 8:
            raise ValueError(f"its header would have {length} bytes, and the file has {size}")
        header: dict[str, Any] = json.loads(bytes(self._bytes(8, length)))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if entry["dtype"] not in DTYPES:
                raise ValueError(f"tensor {name!r} has dtype {entry['dtype']!r}, which is not known here")
            spec = Spec(tuple(entry["shape"]), DTYPES[entry["dtype"]])
            begin, end = entry["data_offsets"]
            if end - begin != spec.nbytes or 8 + length + end > size:
                raise ValueError(f"tensor {name!r} does not fit into the file")
            self.specs[name], self._starts[name] = spec, 8 + length + begin

    def _bytes(self, offset: int, count: int) -> memoryview:
        data = memoryview(bytearray(count))
        _read_into(data, self.path, self._file.fileno(), offset)
        return data

    def read(self, name: str, start: int, count: int) -> Tensor:
        """Rows ``start`` to ``start + count`` of a tensor: [count, last axis], or [count] of a vector."""
        place = self.place(name, start, count)
        out = torch.empty((count, *self.specs[name].row_shape), dtype=place.dtype)
        if out.numel():
            _read_into(_bytes(out), self.path, place.descriptor, place.offset)
        return out

    def place(self, name: str, start: int, count: int) -> Place:
        """Where rows ``start`` to ``start + count`` lie."""
        spec = self.specs[name]
        row_bytes = math.prod(spec.row_shape) * spec.dtype.itemsize
        offset = self._starts[name] + start * row_bytes
        return Place(self.path, self._file.fileno(), offset, count * row_bytes, spec.dtype)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()


@dataclass
class _Shard:
    path: Path
    names: list[str] = field(default_factory=list)
    nbytes: int = 0


class ShardWriter:
    """Writes tensors, known beforehand, to files of at most ``shard_bytes``, as their rows come.

    Rows are given in the order of ``specs``, each tensor from its first row to its last. A thread writes while the next rows
    are made.
    """

    def __init__(
        self,
        folder: Path,
        specs: dict[str, Spec],
        shard_bytes: int,
        file_name: Callable[[int, int], str],
        seen: Callable[[str, memoryview], None] | None = None,
    ) -> None:
        """
        Args:
            file_name: name of shard ``number`` (from 1) of ``count``.
            seen: is told all bytes of each file in order, while they are in the cache.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.specs, self.seen = specs, seen
        self.shards: list[_Shard] = [_Shard(folder)]
        for name, spec in specs.items():
            if self.shards[-1].names and self.shards[-1].nbytes + spec.nbytes > shard_bytes:
                self.shards.append(_Shard(folder))
            self.shards[-1].names.append(name)
            self.shards[-1].nbytes += spec.nbytes
        self.files: dict[str, str] = {}
        """File of each tensor."""
        for number, shard in enumerate(self.shards, start=1):
            shard.path = folder / file_name(number, len(self.shards))
            self.files.update(dict.fromkeys(shard.names, shard.path.name))
        self._waiting = list(reversed(self.shards))
        self._shard, self._left = self.shards[0], 0
        self._queue: queue.Queue[_Shard | Place | memoryview | None] = queue.Queue(4)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="writer", daemon=True)
        self._thread.start()

    def add(self, rows: Tensor) -> None:
        """The next rows. They must not change any more."""
        self._begin(rows.nbytes)
        self._put(_bytes(rows.contiguous()))

    def copy(self, place: Place) -> None:
        """The next rows, as they lie in another file; the kernel copies them."""
        self._begin(place.nbytes)
        self._put(place)

    def _begin(self, nbytes: int) -> None:
        """Rows of so many bytes are coming: begins a file when the last one is full."""
        if self._error is not None:
            self.close()
        if self._left == 0:
            self._shard = self._waiting.pop()
            self._left = self._shard.nbytes
            self._queue.put(self._shard)
            self._put(memoryview(_header({name: self.specs[name] for name in self._shard.names})))
        self._left -= nbytes

    def _put(self, item: Place | memoryview) -> None:
        self._queue.put(item)
        if self.seen is not None:  # meanwhile the thread writes
            self.seen(self._shard.path.name, item.read() if isinstance(item, Place) else item)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        """Closes it; after an error that is not the writer's own, what is written stays incomplete."""
        if kind is None:
            self.close()
        else:
            self._stop()

    def _stop(self) -> None:
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()

    def close(self) -> None:
        """Waits until everything is written; raises what went wrong."""
        self._stop()
        if self._error is not None:
            raise self._error
        if self._left or self._waiting:
            raise ValueError(f"{self._shard.path} lacks {self._left} bytes, and {len(self._waiting)} files were not begun")

    def _work(self) -> None:
        file: Any = None
        try:
            while (item := self._queue.get()) is not None:
                if isinstance(item, _Shard):
                    if file is not None:
                        file.close()
                    file = open(item.path, "wb", buffering=0)
                    _reserve(file.fileno(), item.nbytes)
                    continue
                if isinstance(item, Place):
                    item = _copy(item, file.fileno())
                while len(item):
                    item = item[file.write(item) :]
        except BaseException as error:
            self._error = error
            while self._queue.get() is not None:  # nobody waits for a writer that has failed
                pass
        finally:
            if file is not None:
                file.close()


def _copy(place: Place, target: int) -> memoryview:
    """Lets the kernel append the bytes to ``target``; returns those that it could not."""
    offset, left = place.offset, place.nbytes
    try:
        while left and hasattr(os, "copy_file_range"):
            done = os.copy_file_range(place.descriptor, target, left, offset)
            if done == 0:
                break
            offset, left = offset + done, left - done
    except OSError as error:  # not between these two file systems
        if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF):
            raise
    return replace(place, offset=offset, nbytes=left).read()


def _read_into(data: memoryview, path: Path, descriptor: int, offset: int) -> None:
    """Fills ``data`` from a file; a single read may give less (signals, network file systems, more than 2 GiB)."""
    while len(data):
        got = os.preadv(descriptor, [data], offset)
        if got <= 0:
            raise UsageError(f"{path} ends at byte {offset}, inside a tensor")
        data, offset = data[got:], offset + got


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    array: Any = tensor.flatten().view(torch.uint8).numpy()
    return memoryview(array)


def _reserve(descriptor: int, size: int) -> None:
    """Asks for the file's room at once: writing is several times faster than into a growing file, and a full disk is found out
    before anything is written."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
                raise
            # Some file systems cannot; they are written to as they are.


def _header(specs: dict[str, Spec]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, spec in specs.items():
        ends = [position, position + spec.nbytes]
        entries[name] = {"dtype": CODES[spec.dtype], "shape": list(spec.shape), "data_offsets": ends}
        position = ends[1]
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
