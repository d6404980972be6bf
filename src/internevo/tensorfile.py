"""Safetensors files as streams: rows of a tensor are read and written without holding more than those rows.

The format (https://huggingface.co/docs/safetensors): the header's length as 8 bytes, a JSON header of names, dtypes, shapes and
offsets, and the tensors' bytes. Reading is by plain reads: the pages of a memory map would count as this process's memory.

The rows of a tensor are those of its view [everything but the last axis, last axis]; of a vector, its elements.
"""

from __future__ import annotations

import json
import math
import os
import queue
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import UsageError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
CODES = {dtype: code for code, dtype in DTYPES.items()}
CHUNK_BYTES = 32 << 20
"""Bytes that are read, converted and written at once."""


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
        length = int.from_bytes(self._file.read(8), "little")
        if not 2 <= length <= size - 8:
            raise ValueError(f"its header would have {length} bytes, and the file has {size}")
        header: dict[str, Any] = json.loads(self._file.read(length))
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

    def read(self, name: str, start: int, count: int) -> Tensor:
        """Rows ``start`` to ``start + count`` of a tensor: [count, last axis], or [count] of a vector."""
        spec = self.specs[name]
        out = torch.empty((count, *spec.row_shape), dtype=spec.dtype)
        if out.numel() == 0:
            return out
        view = memoryview(out.flatten().view(torch.uint8).numpy())
        position = self._starts[name] + start * (out.nbytes // count)
        while len(view):
            got = os.preadv(self._file.fileno(), [view], position)
            if got <= 0:
                raise UsageError(f"{self.path} ends at byte {position}, inside tensor {name!r}")
            view, position = view[got:], position + got
        return out

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
        seen: Callable[[str, memoryview], None] = lambda file, data: None,
    ) -> None:
        """
        Args:
            file_name: name of shard ``number`` (from 1) of ``count``.
            seen: is told, in the writing thread, all bytes of each file in order.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.specs, self.seen = specs, seen
        self.files: dict[str, str] = {}
        """File of each tensor."""
        groups: list[_Shard] = [_Shard(folder)]
        for name, spec in specs.items():
            if groups[-1].names and groups[-1].nbytes + spec.nbytes > shard_bytes:
                groups.append(_Shard(folder))
            groups[-1].names.append(name)
            groups[-1].nbytes += spec.nbytes
        for number, group in enumerate(groups, start=1):
            group.path = folder / file_name(number, len(groups))
            self.files.update(dict.fromkeys(group.names, group.path.name))
        self.shards = groups
        self._queue: queue.Queue[Tensor | None] = queue.Queue(2)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="writer", daemon=True)
        self._thread.start()

    def add(self, rows: Tensor) -> None:
        """The next rows. They must not change any more."""
        self._queue.put(rows)
        if self._error is not None:
            self.close()

    def close(self) -> None:
        """Waits until everything is written; raises what went wrong."""
        self._queue.put(None)
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _work(self) -> None:
        try:
            for shard in self.shards:
                with open(shard.path, "wb", buffering=0) as file:
                    self._put(file, shard, memoryview(_header({n: self.specs[n] for n in shard.names})))
                    left = shard.nbytes
                    while left:
                        rows = self._queue.get()
                        if rows is None:
                            raise ValueError(f"{shard.path} lacks {left} bytes of its tensors")
                        left -= rows.nbytes
                        if left < 0:
                            raise ValueError(f"{shard.path} was given rows of the next shard")
                        self._put(file, shard, memoryview(rows.contiguous().flatten().view(torch.uint8).numpy()))
        except BaseException as error:
            self._error = error
        while self._queue.get() is not None:  # nobody waits for a writer that has failed
            pass

    def _put(self, file: Any, shard: _Shard, data: memoryview) -> None:
        self.seen(shard.path.name, data)
        while len(data):
            data = data[file.write(data) :]


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
