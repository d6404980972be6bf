"""Raw input files: which there are, and how they are cut into jobs for the workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ...errors import DataError, UsageError
from .files import COMPRESSED, arrow_batches, open_input, open_parquet, suffix, walk

SUFFIXES = {
    "text": (".txt",),
    "json": (".json",),
    "jsonl": (".jsonl", ".ndjson"),
    "csv": (".csv", ".tsv"),
    "parquet": (".parquet",),
    "arrow": (".arrow",),
}
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
    """The part of the file: bytes; or rows of ``table``."""
    table: int = 0
    """Row group of a parquet file, record batch of an arrow file."""
    content: bytes | None = None
    """Whole rows, where the file can only be read from its beginning; the first is at byte ``start`` of the unpacked file."""
    header: bytes = b""
    """The first row of a csv file."""
    error: str = ""
    """Why (the rest of) the file cannot be read."""


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
            found += [(kind or _kind(file), file) for file in walk(path, exclude) if _fits(file, kind, pattern)]
        else:
            raise UsageError(f"input {path} does not exist")
    if not found:
        raise UsageError(f"no input files in {', '.join(map(str, inputs))}: give --format or --pattern, or check the folder")
    return found


def _fits(path: Path, kind: str | None, pattern: str | None) -> bool:
    suffixes = SUFFIXES[kind] if kind else tuple(s for group in SUFFIXES.values() for s in group)
    return (path.match(pattern) if pattern else suffix(path) in suffixes) and path.is_file()


def _kind(path: Path) -> str:
    for kind, suffixes in SUFFIXES.items():
        if suffix(path) in suffixes:
            return kind
    raise UsageError(f"{path}: the format cannot be told from {suffix(path)!r}; give --format {', '.join(SUFFIXES)}")


def make_jobs(files: list[tuple[str, Path]]) -> Iterator[Job]:
    """Cuts the input into pieces of about ``JOB_BYTES``, in order.

    Plain lines are cut by bytes, parquet by row groups and arrow by record batches; workers read these parts themselves.
    Compressed lines and csv can only be read from their beginning: that is done here, and the pieces go to the workers.
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
            yield from cut(kind, path)
    if pending:
        yield Job("text", tuple(pending), waiting)


def cut(kind: str, path: Path) -> Iterator[Job]:
    """The jobs of one file; where it breaks, the last one says why."""
    size = done = 0
    try:
        size = path.stat().st_size
        for job in _CUT["packed" if is_sequential(kind, path) else kind](kind, path, size):
            done += job.size
            yield job
    except (DataError, OSError) as error:
        yield Job(kind, (str(path),), size - done, error=str(error))


def is_sequential(kind: str, path: Path) -> bool:
    """Whether a file of many documents can only be read from its beginning."""
    return kind == "csv" or (kind == "jsonl" and path.suffix in COMPRESSED)


def _whole(kind: str, path: Path, size: int) -> Iterator[Job]:
    yield Job(kind, (str(path),), size)


def _by_bytes(kind: str, path: Path, size: int) -> Iterator[Job]:
    for start in range(0, size, JOB_BYTES):
        stop = min(start + JOB_BYTES, size)
        yield Job(kind, (str(path),), stop - start, start, stop)


def _by_row_groups(kind: str, path: Path, size: int) -> Iterator[Job]:
    meta = open_parquet(str(path)).metadata
    groups = [meta.row_group(number) for number in range(meta.num_row_groups)]
    yield from _by_rows(kind, path, size, [(group.num_rows, group.total_byte_size) for group in groups])


def _by_batches(kind: str, path: Path, size: int) -> Iterator[Job]:
    yield from _by_rows(kind, path, size, [(batch.num_rows, batch.nbytes) for batch in arrow_batches(str(path))])


def _by_rows(kind: str, path: Path, size: int, tables: list[tuple[int, int]]) -> Iterator[Job]:
    """Tables of (rows, bytes), large ones in slices. A slice of a parquet file is read through the rows before it, which is
    cheap beside tokenizing as long as there are not too many slices."""
    every, done = max(1, sum(rows for rows, _ in tables)), 0
    for table, (rows, space) in enumerate(tables):
        slices = max(1, min(rows, space // (4 * JOB_BYTES)))
        for number in range(slices):
            start, stop = rows * number // slices, rows * (number + 1) // slices
            share = size * (done + stop) // every - size * (done + start) // every
            yield Job(kind, (str(path),), share, start, stop, table)
        done += rows


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
    "json": _whole,
    "jsonl": _by_bytes,
    "packed": _pieces,
    "parquet": _by_row_groups,
    "arrow": _by_batches,
}
