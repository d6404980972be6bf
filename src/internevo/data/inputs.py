"""Raw input files: which there are, and how they are cut into jobs for the workers."""

from __future__ import annotations

import gzip
import io
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from ..errors import DataError, UsageError

SUFFIXES = {
    "text": (".txt",),
    "json": (".json",),
    "jsonl": (".jsonl", ".ndjson"),
    "csv": (".csv", ".tsv"),
    "parquet": (".parquet",),
}
COMPRESSED = (".gz", ".zst")
JOB_BYTES = 1 << 20
"""Input that a worker takes at once."""


@dataclass(frozen=True)
class Job:
    """A piece of the input: some whole files, a part of one, or content that was read already."""

    kind: str
    files: tuple[str, ...]
    size: int
    """Bytes of input, for the progress."""
    start: int = 0
    stop: int = 0
    """The part of the file: bytes; row groups of parquet."""
    content: bytes | None = None
    """Whole rows, where the file can only be read from its beginning; the first is at byte ``start`` of the unpacked file."""
    header: bytes = b""
    """The first row of a csv file."""


def find_files(inputs: list[Path], kind: str | None, pattern: str | None, exclude: tuple[str, ...]) -> list[tuple[str, Path]]:
    """(kind, path) of every input file, folders searched in sorted order.

    Args:
        kind: a key of ``SUFFIXES``; by default from each file's suffix (``.gz`` and ``.zst`` left out).
        pattern: a glob for file names inside folders, instead of the kind's usual suffixes.
        exclude: names of folders that are not entered.
    """
    found: list[tuple[str, Path]] = []
    for path in inputs:
        if path.is_file():
            found.append((kind or _kind(path), path))
        elif path.is_dir():
            found += [(kind or _kind(file), file) for file in _walk(path, kind, pattern, exclude)]
        else:
            raise UsageError(f"input {path} does not exist")
    if not found:
        raise UsageError(f"no input files in {', '.join(map(str, inputs))}: give --format or --pattern, or check the folder")
    return found


def _walk(root: Path, kind: str | None, pattern: str | None, exclude: tuple[str, ...]) -> Iterator[Path]:
    suffixes = SUFFIXES[kind] if kind else tuple(s for group in SUFFIXES.values() for s in group)
    for folder, names, files in os.walk(root):
        names[:] = sorted(n for n in names if n not in exclude and not n.startswith("."))
        for name in sorted(files):
            path = Path(folder, name)
            if (path.match(pattern) if pattern else suffix(path) in suffixes) and path.is_file():
                yield path


def suffix(path: Path) -> str:
    """What tells a file's format: ".jsonl" for ``a.jsonl`` and for ``a.jsonl.gz``."""
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def _kind(path: Path) -> str:
    for kind, suffixes in SUFFIXES.items():
        if suffix(path) in suffixes:
            return kind
    raise UsageError(f"{path}: the format cannot be told from {suffix(path)!r}; give --format {', '.join(SUFFIXES)}")


def make_jobs(files: list[tuple[str, Path]]) -> Iterator[Job]:
    """Cuts the input into pieces of about ``JOB_BYTES``, in order.

    Plain lines are cut by bytes, and parquet by row groups; workers read these parts themselves. Compressed lines and csv can
    only be read from their beginning: that is done here, and the pieces go to the workers.
    """
    pending: list[str] = []
    waiting = 0
    for kind, path in files:
        size = path.stat().st_size
        if pending and (kind != "text" or waiting + size > JOB_BYTES):
            yield Job("text", tuple(pending), waiting)
            pending, waiting = [], 0
        if kind == "text":
            pending.append(str(path))
            waiting += size
        else:
            yield from _CUT.get(kind, _whole)(kind, path, size)
    if pending:
        yield Job("text", tuple(pending), waiting)


def _whole(kind: str, path: Path, size: int) -> Iterator[Job]:
    yield Job(kind, (str(path),), size)


def _by_bytes(kind: str, path: Path, size: int) -> Iterator[Job]:
    if path.suffix in COMPRESSED:
        yield from _pieces(kind, path, size)
        return
    for start in range(0, size, JOB_BYTES):
        stop = min(start + JOB_BYTES, size)
        yield Job(kind, (str(path),), stop - start, start, stop)


def _by_row_groups(kind: str, path: Path, size: int) -> Iterator[Job]:
    groups = open_parquet(str(path)).num_row_groups
    for group in range(groups):
        yield Job(kind, (str(path),), size * (group + 1) // groups - size * group // groups, group, group + 1)


def _pieces(kind: str, path: Path, size: int) -> Iterator[Job]:
    """Whole rows of a file that is read from its beginning."""
    rest_of_row = _rest_of_csv_row if kind == "csv" else lambda file, begun: file.readline()
    with open_input(str(path)) as (file, place):
        header = _rest_of_csv_row(file, b"") if kind == "csv" else b""
        offset, before = len(header), 0
        while content := file.read(JOB_BYTES):
            content += rest_of_row(file, content)
            yield Job(kind, (str(path),), place() - before, offset, content=content, header=header)
            offset, before = offset + len(content), place()


def _rest_of_csv_row(file: BinaryIO, begun: bytes) -> bytes:
    """Up to the end of the row that ``begun`` ends in. A line's end inside a field, between quotes, ends no row."""
    lines, quotes = [file.readline()], begun.count(b'"')
    while (quotes := quotes + lines[-1].count(b'"')) % 2 and lines[-1]:
        lines.append(file.readline())
    return b"".join(lines)


_CUT: dict[str, Callable[[str, Path, int], Iterator[Job]]] = {
    "jsonl": _by_bytes,
    "csv": _pieces,
    "parquet": _by_row_groups,
}


# Opening and reading -------------------------------------------------------------------------------------------------


@contextmanager
def open_input(path: str) -> Iterator[tuple[BinaryIO, Callable[[], int]]]:
    """A file's unpacked bytes, and a function that says how many of its own bytes were read.

    Raises:
        DataError: when it cannot be unpacked.
    """
    with open(path, "rb") as raw:
        file: Any = raw
        if path.endswith(".gz"):
            file = gzip.GzipFile(fileobj=raw)
        elif path.endswith(".zst"):
            file = io.BufferedReader(_Zstandard(raw), JOB_BYTES)
        try:
            yield file, raw.tell
        except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
            raise DataError(f"{path} cannot be unpacked: {error}") from error


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
            packed = packed or self.raw.read(JOB_BYTES)
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
