"""Opening input files: folders walked in order, packed files unpacked, tables of pyarrow."""

from __future__ import annotations

import gzip
import io
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from ...errors import DataError

COMPRESSED = (".gz", ".zst")
READ_BYTES = 1 << 20


def walk(root: Path, exclude: tuple[str, ...] = ()) -> Iterator[Path]:
    """Files below ``root`` in sorted order, links followed, hidden folders and those named in ``exclude`` left out.

    Raises:
        DataError: when a link leads back to a folder that it lies in.
    """
    above: dict[str, tuple[str, ...]] = {}
    for folder, names, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        parents = above.get(os.path.dirname(folder), ())
        if real in parents:
            raise DataError(f"{folder} is a link that leads back to {real}, which it lies in: remove it")
        above[folder] = (*parents, real)
        names[:] = sorted(n for n in names if n not in exclude and not n.startswith("."))
        yield from (Path(folder, name) for name in sorted(files))


def suffix(path: Path) -> str:
    """What tells a file's format: ".jsonl" for ``a.jsonl`` and for ``a.jsonl.gz``."""
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


@contextmanager
def open_input(path: str) -> Iterator[tuple[BinaryIO, Callable[[], int]]]:
    """A file's unpacked bytes, and a function that says how many of its own bytes were read.

    Raises:
        DataError: when it is not there, or cannot be unpacked.
    """
    try:
        with open(path, "rb") as raw:
            file: Any = raw
            if path.endswith(".gz"):
                file = gzip.GzipFile(fileobj=raw)
            elif path.endswith(".zst"):
                file = io.BufferedReader(_Zstandard(raw), READ_BYTES)
            yield file, raw.tell
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


class _Zstandard(io.RawIOBase):
    """The frames of a .zst file. (The library's own reader takes a file that was cut off for a whole one.)"""

    def __init__(self, raw: BinaryIO) -> None:
        self.raw, self.unpacker = raw, zstandard.ZstdDecompressor()
        self.frame: Any = None
        self.ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.ready:
            packed = self.frame.unused_data if self.frame is not None and self.frame.eof else b""
            packed = packed or self.raw.read(READ_BYTES)
            if not packed:
                if self.frame is not None and not self.frame.eof:
                    raise EOFError("it ends inside a frame")
                return 0
            if self.frame is None or self.frame.eof:
                self.frame = self.unpacker.decompressobj()
            self.ready = self.frame.decompress(packed)
        count = min(len(buffer), len(self.ready))
        buffer[:count], self.ready = self.ready[:count], self.ready[count:]
        return count


def read_input(path: str) -> bytes:
    """All of a file's bytes, unpacked."""
    with open_input(path) as (file, _):
        return file.read()


def open_parquet(path: str):  # type: ignore[no-untyped-def]
    """A ``pyarrow.parquet.ParquetFile``."""
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a parquet file: {error}") from error


@lru_cache(16)
def arrow_batches(path: str) -> list:  # type: ignore[type-arg]
    """The record batches of an arrow file (a stream, as the ``datasets`` library writes, or with an index), memory-mapped.

    Kept for the next jobs of the same file: a stream has no index, and is walked to find its batches.
    """
    import pyarrow

    try:
        with pyarrow.memory_map(path) as mapped:
            if mapped.read(6) == b"ARROW1":
                file = pyarrow.ipc.open_file(mapped)
                return [file.get_batch(number) for number in range(file.num_record_batches)]
            mapped.seek(0)
            return list(pyarrow.ipc.open_stream(mapped))
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not an arrow file: {error}") from error
