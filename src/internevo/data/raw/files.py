"""Finds and opens input files: walks folders in sorted order, decompresses, and opens parquet and arrow files."""

from __future__ import annotations

import gzip
import hashlib
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
SAMPLES, SAMPLE_BYTES = 2048, 1 << 14
"""How many samples of the content of files are compared to notice a change, and the size of each."""


def walk_files(root: Path, exclude: tuple[str, ...] = ()) -> Iterator[Path]:
    """Yields all files below ``root`` in sorted order.

    Symbolic links are followed. Hidden folders, and folders whose name is in ``exclude``, are left out.

    Raises:
        DataError: if a link points to a folder that contains it.
    """
    above: dict[str, tuple[str, ...]] = {}
    for folder, names, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        parents = above.get(os.path.dirname(folder), ())
        if real in parents:
            raise DataError(f"{folder} is a link to {real}, which contains the link: remove the link")
        above[folder] = (*parents, real)
        names[:] = sorted(n for n in names if n not in exclude and not n.startswith("."))
        yield from (Path(folder, name) for name in sorted(files))


def sample_content(paths: list[Path]) -> str:
    """Returns a hash of the sizes of files and of about ``SAMPLES`` samples of their content, in this order.

    Files of up to 32 MiB together are read as a whole. Of many files, the content of some is not read.
    """
    digest, per_file = hashlib.sha256(), max(1, SAMPLES // max(1, len(paths)))
    for number, path in enumerate(paths):
        size = path.stat().st_size
        digest.update(f"{size} ".encode())
        if number % (len(paths) // SAMPLES + 1):
            continue
        with open(path, "rb") as file:
            step = max(SAMPLE_BYTES, size // per_file)
            for start in range(0, size, step):
                file.seek(start)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def format_suffix(path: Path) -> str:
    """Returns the suffix that tells a file's format: ".jsonl" for ``a.jsonl`` and for ``a.jsonl.gz``."""
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


@contextmanager
def open_input(path: str) -> Iterator[tuple[BinaryIO, Callable[[], int]]]:
    """Opens a file and decompresses it while it is read.

    Yields the file, and a function that returns how many bytes of the (compressed) file on disk have been read.

    Raises:
        DataError: if the file does not exist, cannot be read or cannot be decompressed.
    """
    try:
        with open(path, "rb") as raw:
            file: Any = raw
            if path.endswith(".gz"):
                file = gzip.GzipFile(fileobj=raw)
            elif path.endswith(".zst"):
                file = io.BufferedReader(_ZstdReader(raw), READ_BYTES)
            yield file, raw.tell
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


class _ZstdReader(io.RawIOBase):
    """Decompresses the frames of a .zst file. Unlike the library's own reader, it notices that a file is truncated."""

    def __init__(self, raw: BinaryIO) -> None:
        self.raw, self.decompressor = raw, zstandard.ZstdDecompressor()
        self.frame: Any = None
        self.decompressed = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.decompressed:
            compressed = self.frame.unused_data if self.frame is not None and self.frame.eof else b""
            compressed = compressed or self.raw.read(READ_BYTES)
            if not compressed:
                if self.frame is not None and not self.frame.eof:
                    raise EOFError("the file is truncated: it ends inside a frame")
                return 0
            if self.frame is None or self.frame.eof:
                self.frame = self.decompressor.decompressobj()
            self.decompressed = self.frame.decompress(compressed)
        count = min(len(buffer), len(self.decompressed))
        buffer[:count], self.decompressed = self.decompressed[:count], self.decompressed[count:]
        return count


def read_input(path: str) -> bytes:
    """Returns all bytes of a file, decompressed."""
    with open_input(path) as (file, _):
        return file.read()


def open_parquet(path: str):  # type: ignore[no-untyped-def]
    """Opens a parquet file as a ``pyarrow.parquet.ParquetFile``."""
    import pyarrow
    from pyarrow import parquet

    try:
        return parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a parquet file: {error}") from error


@lru_cache(16)
def arrow_batches(path: str) -> list:  # type: ignore[type-arg]
    """Returns the record batches of an arrow file, memory-mapped.

    Both of arrow's formats are read: the stream that the ``datasets`` library writes, and the file format, which has an index.
    The result is cached for the next chunks of the same file, because a stream has to be read through to find its batches.
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
