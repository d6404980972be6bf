"""Safetensors files, read and written a few rows at a time, so that a whole tensor is never in memory.

The format (https://huggingface.co/docs/safetensors): the header's length in 8 bytes, a JSON header with names, dtypes, shapes
and offsets, and then the tensors' bytes. Files are read with ``pread``, not with a memory map, because mapped pages count as
this process's memory.

Rows: a tensor is seen as a matrix [product of all other dimensions, last dimension]. The rows of a vector are its elements.
"""

from __future__ import annotations

import ctypes
import errno
import math
import os
import queue
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from ..wording import counted
from .header import MAX_HEADER, Spec, make_header, parse_header
from .naming import naming


def as_rows(tensor: Tensor) -> Tensor:
    """Returns a view of a tensor whose first dimension is the rows: [rows, last dimension], or [rows] of a vector."""
    return tensor.flatten(0, -2) if tensor.dim() > 1 else tensor


def joint_dtype(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """Returns a dtype that holds every value of all ``dtypes``: the dtype itself if all are the same, otherwise float32 (or
    float64, if that is among them)."""
    found = set(dtypes)
    if len(found) == 1:
        return found.pop()
    return torch.float64 if torch.float64 in found else torch.float32


@dataclass(frozen=True)
class ByteRange:
    """The bytes of some rows of a tensor in an open file."""

    path: Path
    descriptor: int
    offset: int
    nbytes: int
    dtype: torch.dtype
    """The dtype of the values in the file."""

    def read(self) -> memoryview:
        """Reads the bytes."""
        data = memoryview(bytearray(self.nbytes))
        _read_into(data, self.path, self.descriptor, self.offset)
        return data


class TensorFile:
    """A safetensors file that is open for reading.

    Raises:
        UsageError: if the file cannot be read, is not a safetensors file, or is truncated.
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
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UsageError(f"{path} is not a safetensors file: {error}") from error

    def _read_header(self) -> None:
        size = os.fstat(self._file.fileno()).st_size
        length = int.from_bytes(self._bytes(0, min(8, size)), "little")
        if not 2 <= length <= min(size - 8, MAX_HEADER):
            raise ValueError(f"its header should have {length} bytes, which does not fit into the file's {size} bytes")
        header = parse_header(bytes(self._bytes(8, length)))
        position = first = 8 + length
        for name, (spec, begin, end) in sorted(header.items(), key=lambda item: item[1][1:]):
            if end - begin != spec.nbytes or first + end > size:
                raise ValueError(f"tensor {name!r} does not fit into the file")
            if first + begin != position:
                raise ValueError(f"tensor {name!r} does not begin where the one before it ends")
            self.specs[name], self._starts[name] = spec, position
            position += spec.nbytes
        if position != size:
            raise ValueError(f"its tensors end at byte {position}, but the file has {size}")
        self.specs = {name: self.specs[name] for name in header}

    def _bytes(self, offset: int, count: int) -> memoryview:
        data = memoryview(bytearray(count))
        _read_into(data, self.path, self._file.fileno(), offset)
        return data

    def read(self, name: str, start: int, count: int) -> Tensor:
        """Reads rows ``start`` to ``start + count`` of tensor ``name``: [count, last dimension], or [count] of a vector."""
        source = self.byte_range(name, start, count)
        out = torch.empty((count, *self.specs[name].row_shape), dtype=source.dtype)
        if out.numel():
            _read_into(_bytes(out), self.path, source.descriptor, source.offset)
        return out

    def read_box(self, name: str, offsets: Sequence[int], out: Tensor) -> None:
        """Fills ``out`` with the part of tensor ``name`` that begins at ``offsets``. Only its bytes are read, a few at a time.

        Args:
            offsets: index of the first element along every dimension.
            out: of the shape of the part; any dtype and device.
        """
        spec = self.specs[name]
        if not out.numel():
            return
        if out.dim() < 2:
            matrices = [(sum(offsets), out.view(-1))]
        elif out.dim() == 2:
            matrices = [(offsets[0], out)]
        else:
            matrices = [((offsets[0] + n) * spec.shape[1] + offsets[1], part) for n, part in enumerate(out)]
        columns = range(offsets[-1], offsets[-1] + out.shape[-1]) if out.dim() > 1 else None
        for first, rows in matrices:
            for row, count in spec.chunks(first, len(rows)):
                rows[row - first : row - first + count].copy_(self._read_columns(name, row, count, columns))

    def _read_columns(self, name: str, start: int, count: int, columns: range | None) -> Tensor:
        """Reads some columns of rows ``start`` to ``start + count``; None: all of them, or elements of a vector."""
        spec = self.specs[name]
        if columns is None or len(columns) == spec.shape[-1]:
            return self.read(name, start, count)
        source, size = self.byte_range(name, start, count), spec.dtype.itemsize
        out = torch.empty((count, len(columns)), dtype=spec.dtype)
        memory, width, row_bytes = _bytes(out), len(columns) * size, spec.shape[-1] * size
        for row in range(count):
            part = memory[row * width : (row + 1) * width]
            _read_into(part, self.path, source.descriptor, source.offset + row * row_bytes + columns.start * size)
        return out

    def byte_range(self, name: str, start: int, count: int) -> ByteRange:
        """Returns where in the file rows ``start`` to ``start + count`` of tensor ``name`` are."""
        spec = self.specs[name]
        row_bytes = math.prod(spec.row_shape) * spec.dtype.itemsize
        offset = self._starts[name] + start * row_bytes
        return ByteRange(self.path, self._file.fileno(), offset, count * row_bytes, spec.dtype)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()


@dataclass
class _Shard:
    path: Path
    names: list[str] = field(default_factory=list)
    nbytes: int = 0


class ShardWriter:
    """Writes tensors to files of at most ``shard_bytes`` each (or of one tensor, if it is larger), a few rows at a time.

    All tensors and their order are known at the start (``specs``). Their rows are added in this order, each tensor from its
    first row to its last. A thread writes to the files while the caller prepares the next rows.
    """

    def __init__(
        self,
        folder: Path,
        specs: dict[str, Spec],
        shard_bytes: int,
        file_name: Callable[[int, int], str],
        on_bytes: Callable[[str, memoryview], None] | None = None,
    ) -> None:
        """
        Args:
            file_name: called with (number of a file, from 1; number of files); returns the file's name.
            on_bytes: called with (name of a file, next bytes of it) while the bytes are in the cache; for checksums.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.specs, self.on_bytes = specs, on_bytes
        self.shards: list[_Shard] = [_Shard(folder)]
        for name, spec in specs.items():
            if self.shards[-1].names and self.shards[-1].nbytes + spec.nbytes > shard_bytes:
                self.shards.append(_Shard(folder))
            self.shards[-1].names.append(name)
            self.shards[-1].nbytes += spec.nbytes
        self.files: dict[str, str] = {}
        """The name of each tensor's file."""
        for number, shard in enumerate(self.shards, start=1):
            shard.path = folder / file_name(number, len(self.shards))
            self.files.update(dict.fromkeys(shard.names, shard.path.name))
        self._waiting = list(reversed(self.shards))
        self._shard, self._left = self.shards[0], 0
        self._queue: queue.Queue[_Shard | ByteRange | memoryview | None] = queue.Queue(4)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="writer", daemon=True)
        self._thread.start()

    def add(self, rows: Tensor) -> None:
        """Adds the next rows. The caller must not change them afterwards."""
        self._append(_bytes(rows.contiguous()), rows.nbytes)

    def copy(self, source: ByteRange) -> None:
        """Adds the next rows from another file, unchanged. The operating system copies them from file to file."""
        self._append(source, source.nbytes)

    def _append(self, item: ByteRange | memoryview, nbytes: int) -> None:
        """Gives the next bytes to the thread, and starts the next file before them if the current one is full."""
        if self._error is not None:
            self.close()
        if nbytes == 0:
            return
        while self._left == 0:
            self._start_next_file()
        self._left -= nbytes
        self._put(item)

    def _start_next_file(self) -> None:
        self._shard = self._waiting.pop()
        self._left = self._shard.nbytes
        self._queue.put(self._shard)
        self._put(memoryview(make_header({name: self.specs[name] for name in self._shard.names})))

    def _put(self, item: ByteRange | memoryview) -> None:
        self._queue.put(item)
        if self.on_bytes is not None:  # meanwhile the thread writes
            self.on_bytes(self._shard.path.name, item.read() if isinstance(item, ByteRange) else item)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        """Closes the files. After an error of the caller, the files stay incomplete."""
        if kind is None:
            self.close()
        else:
            self._stop()

    def _stop(self) -> None:
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()

    def close(self) -> None:
        """Waits until everything is written.

        Raises:
            OSError: if writing failed.
            ValueError: if rows are missing.
        """
        while self._left == 0 and self._waiting and self._waiting[-1].nbytes == 0:
            self._start_next_file()  # a file whose tensors have no elements
        self._stop()
        if self._error is not None:
            raise self._error
        if self._left or self._waiting:
            raise ValueError(f"{self._shard.path} lacks {counted(self._left, 'byte')}; files not started: {len(self._waiting)}")

    def _work(self) -> None:
        file: Any = None
        path = self.shards[0].path
        try:
            while (item := self._queue.get()) is not None:
                if isinstance(item, _Shard):
                    path = item.path
                with naming(path):
                    file = _write(item, file)
        except BaseException as error:
            self._error = error
            while self._queue.get() is not None:  # empty the queue, so that the caller does not wait in ``put`` forever
                pass
        finally:
            if file is not None:
                file.close()


def _write(item: _Shard | ByteRange | memoryview, file: Any) -> Any:
    """Writes bytes to a file, or closes it and opens the next one. Returns the file that is open then."""
    if isinstance(item, _Shard):
        if file is not None:
            file.close()
        file = open(item.path, "wb", buffering=0)
        _reserve(file.fileno(), item.nbytes)
        return file
    if isinstance(item, ByteRange):
        item = _copy(item, file.fileno())
    while len(item):
        item = item[file.write(item) :]
    return file


def _copy(source: ByteRange, target: int) -> memoryview:
    """Lets the operating system append the bytes to the file ``target``. Returns the bytes that it could not copy."""
    offset, left = source.offset, source.nbytes
    try:
        while left and hasattr(os, "copy_file_range"):
            done = os.copy_file_range(source.descriptor, target, left, offset)
            if done == 0:
                break
            offset, left = offset + done, left - done
    except OSError as error:  # it cannot copy between some file systems
        if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF):
            raise
    return replace(source, offset=offset, nbytes=left).read()


def _read_into(data: memoryview, path: Path, descriptor: int, offset: int) -> None:
    """Fills ``data`` from a file. A single read may return less than asked for (signals, network file systems, over 2 GiB)."""
    while len(data):
        got = os.preadv(descriptor, [data], offset)
        if got <= 0:
            raise UsageError(f"{path} ends at byte {offset}, inside a tensor: it is truncated; copy or write it again")
        data, offset = data[got:], offset + got


def _bytes(tensor: Tensor) -> memoryview:
    """Returns the memory of a contiguous tensor, without a copy."""
    array: Any = tensor.flatten().view(torch.uint8).numpy()
    return memoryview(array)


def _reserve(descriptor: int, size: int) -> None:
    """Allocates the whole file at once. Writing is then several times faster than to a growing file, and a full disk is noticed
    before anything is written.

    Some file systems (NFS before 4.2, for one) cannot allocate in advance, and the file then grows as it is written. There,
    ``os.posix_fallocate`` would write a byte into each page first, so it is not used.
    """
    fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None) if sys.platform == "linux" else None
    if fallocate is not None and fallocate(descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(size)) != 0:
        number = ctypes.get_errno()
        if number in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise OSError(number, os.strerror(number))
