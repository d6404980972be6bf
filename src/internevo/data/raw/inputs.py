"""Finds the raw input files, and splits them into chunks, each of which one worker reads and encodes."""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path

from ...errors import DataError, UsageError
from .files import COMPRESSED, arrow_batches, format_suffix, open_input, open_parquet, walk_files

SUFFIXES = {
    "text": (".txt",),
    "json": (".json",),
    "jsonl": (".jsonl", ".ndjson"),
    "csv": (".csv", ".tsv"),
    "parquet": (".parquet",),
    "arrow": (".arrow",),
}
"""The kinds of files that can be read, and the suffixes of each."""
CHUNK_BYTES = 1 << 20
"""The size of an input chunk, in bytes of the file."""
MAX_FIELD_BYTES = 64 << 20
"""The longest field of a csv file, which bounds the memory for a file with a quote that is never closed."""
MAX_FIRST_LINE = 64 << 20
"""How many bytes of a .json file are read at most to see whether its first line is JSON by itself."""


@dataclass(frozen=True)
class InputChunk:
    """Input that one worker reads at once: some whole files, a part of one file, or bytes that have already been read."""

    kind: str
    """A key of ``SUFFIXES``."""
    files: tuple[str, ...]
    size: int
    """Its share of the input, in bytes of the (compressed) files; for the progress bar."""
    start: int = 0
    stop: int = 0
    """``start`` and ``stop`` say which part of the file it is: bytes, or rows of ``table``."""
    table: int = 0
    """The number of the row group (parquet) or of the record batch (arrow)."""
    content: bytes | None = None
    """Whole rows that were already read and decompressed, from a file that can only be read from its beginning. They begin at
    byte ``start`` of the decompressed file."""
    header: bytes = b""
    """The first row of a csv file, which names its columns."""
    error: str = ""
    """If not empty: the reason why (the rest of) the file cannot be read."""


def find_files(inputs: list[Path], kind: str | None, pattern: str | None, exclude: tuple[str, ...]) -> list[tuple[str, Path]]:
    """Returns (kind, path) of every input file. Folders are searched in sorted order.

    Args:
        kind: a key of ``SUFFIXES``; None: each file's suffix tells its kind (``.gz`` and ``.zst`` are ignored). In both cases
            a json file with JSON lines is "jsonl".
        pattern: a glob for the names of files inside folders; None: the usual suffixes.
        exclude: names of folders that are not searched.

    Raises:
        UsageError: if an input does not exist, there are no files, or the kind of a file is unknown.
    """
    found: list[tuple[str, Path]] = []
    for path in inputs:
        if path.is_file():
            found.append((_named_kind(path, kind) if kind else suffix_kind(path), path))
        elif path.is_dir():
            found += [(kind or suffix_kind(file), file) for file in walk_files(path, exclude) if _matches(file, kind, pattern)]
        else:
            raise UsageError(f"input {path} does not exist")
    if not found:
        what = f"input files of the format {kind} ({', '.join(SUFFIXES[kind])})" if kind and not pattern else "input files"
        advice = "give another --format, or none" if kind else "give --format or --pattern"
        raise UsageError(f"there are no {what} in {', '.join(map(str, inputs))}: check the folder, or {advice}")
    return [("jsonl" if kind == "json" and _has_json_lines(path) else kind, path) for kind, path in found]


def _has_json_lines(path: Path) -> bool:
    """Whether more follows in a json file after a first line that is JSON by itself, so that the whole file is none."""
    try:
        with open_input(str(path)) as (file, _):
            lines = iter(partial(file.readline, MAX_FIRST_LINE), b"")
            first = next((line for line in lines if line.removeprefix(codecs.BOM_UTF8).strip()), b"")
            if not first.endswith(b"\n"):
                return False  # nothing follows, or the line is longer than a document may be
            json.loads(first.decode("utf-8-sig"))
            return any(line.strip() for line in lines)
    except (DataError, ValueError, RecursionError):  # whoever reads the file says what is wrong with it
        return False


def _matches(path: Path, kind: str | None, pattern: str | None) -> bool:
    suffixes = SUFFIXES[kind] if kind else tuple(s for group in SUFFIXES.values() for s in group)
    return (path.match(pattern) if pattern else format_suffix(path) in suffixes) and path.is_file()


def _named_kind(path: Path, kind: str) -> str:
    """Returns the kind of a file that the user has named.

    Raises:
        UsageError: if the whole of a json, csv, ... file would be read as one text.
    """
    told = _told_kind(path)
    if kind == "text" and told not in (None, "text"):
        raise UsageError(
            f"{path} is a {told} file, and --format text would read all of it as one text; leave --format out, or "
            "name the file .txt"
        )
    return kind


def _told_kind(path: Path) -> str | None:
    return next((kind for kind, suffixes in SUFFIXES.items() if format_suffix(path) in suffixes), None)


def suffix_kind(path: Path) -> str:
    """Returns the kind of a file that its suffix tells, a key of ``SUFFIXES``.

    Raises:
        UsageError: if it tells none.
    """
    if (told := _told_kind(path)) is not None:
        return told
    raise UsageError(
        f"{path}: the suffix {format_suffix(path)!r} does not tell the format; give --format ({', '.join(SUFFIXES)})"
    )


def split_files(files: list[tuple[str, Path]]) -> Iterator[InputChunk]:
    """Splits input files, given as (kind, path), into chunks of about ``CHUNK_BYTES``, in order.

    Uncompressed lines are split by bytes, parquet by row groups and arrow by record batches; the workers read these parts of
    the files. Compressed lines and csv can only be read from their beginning: they are read here, and the chunks hold their
    content. Small text files share a chunk.
    """
    pending: list[str] = []
    pending_size = 0
    for kind, path in files:
        size = path.stat().st_size
        if pending and (kind != "text" or pending_size + size > CHUNK_BYTES):
            yield InputChunk("text", tuple(pending), pending_size)
            pending, pending_size = [], 0
        if kind == "text":
            pending.append(str(path))
            pending_size += size
        else:
            yield from split_file(kind, path)
    if pending:
        yield InputChunk("text", tuple(pending), pending_size)


def split_file(kind: str, path: Path) -> Iterator[InputChunk]:
    """Splits one file into chunks. If the file cannot be read to its end, the last chunk holds the error."""
    size = done = 0
    try:
        size = path.stat().st_size
        for chunk in _SPLITTERS["sequential" if kind == "jsonl" and path.suffix in COMPRESSED else kind](kind, path, size):
            done += chunk.size
            yield chunk
    except (DataError, OSError) as error:
        yield InputChunk(kind, (str(path),), size - done, error=str(error))


def is_sequential(kind: str, path: Path) -> bool:
    """Returns whether a file can only be read from its beginning: csv and compressed lines."""
    return kind == "csv" or (kind == "jsonl" and path.suffix in COMPRESSED)


def _whole_file(kind: str, path: Path, size: int) -> Iterator[InputChunk]:
    yield InputChunk(kind, (str(path),), size)


def _by_bytes(kind: str, path: Path, size: int) -> Iterator[InputChunk]:
    for start in range(0, size, CHUNK_BYTES):
        stop = min(start + CHUNK_BYTES, size)
        yield InputChunk(kind, (str(path),), stop - start, start, stop)


def _by_row_groups(kind: str, path: Path, size: int) -> Iterator[InputChunk]:
    meta = open_parquet(str(path)).metadata
    groups = [meta.row_group(number) for number in range(meta.num_row_groups)]
    yield from _by_rows(kind, path, size, [(group.num_rows, group.total_byte_size) for group in groups])


def _by_batches(kind: str, path: Path, size: int) -> Iterator[InputChunk]:
    yield from _by_rows(kind, path, size, [(batch.num_rows, batch.nbytes) for batch in arrow_batches(str(path))])


def _by_rows(kind: str, path: Path, size: int, tables: list[tuple[int, int]]) -> Iterator[InputChunk]:
    """Yields a chunk for each table, given as (rows, bytes), and several for a large one.

    To read a part of a parquet row group, the rows before it are decoded too. That costs little compared with tokenizing, as
    long as there are not too many parts: each has at least four times ``CHUNK_BYTES``.
    """
    total, done = max(1, sum(rows for rows, _ in tables)), 0
    for table, (rows, nbytes) in enumerate(tables):
        parts = max(1, min(rows, nbytes // (4 * CHUNK_BYTES)))
        for number in range(parts):
            start, stop = rows * number // parts, rows * (number + 1) // parts
            share = size * (done + stop) // total - size * (done + start) // total
            yield InputChunk(kind, (str(path),), share, start, stop, table)
        done += rows


def _sequential(kind: str, path: Path, size: int) -> Iterator[InputChunk]:
    """Reads compressed lines from the beginning of the file, and yields chunks of whole lines."""
    with open_input(str(path)) as (file, bytes_read):
        offset = before = 0
        while content := file.read(CHUNK_BYTES):
            content += file.readline()
            yield InputChunk(kind, (str(path),), bytes_read() - before, offset, content=content)
            offset, before = offset + len(content), bytes_read()


def _by_csv_rows(kind: str, path: Path, size: int) -> Iterator[InputChunk]:
    """Reads a csv file from its beginning, and yields chunks of whole rows."""
    with open_input(str(path)) as (file, bytes_read):
        header, rest, offset, before = b"", b"", 0, 0
        while more := file.read(max(CHUNK_BYTES, len(rest))):
            rest += more + file.readline()
            if not offset and rest.startswith(codecs.BOM_UTF8):
                rest, offset = rest.removeprefix(codecs.BOM_UTF8), len(codecs.BOM_UTF8)
            ends = _csv_row_ends(rest, path, offset)
            if ends and not header:
                header, offset = rest[: ends[0]], offset + ends[0]
                rest, ends = rest[ends[0] :], [end - ends[0] for end in ends[1:]]
            if ends:
                rows, rest = rest[: ends[-1]], rest[ends[-1] :]
                yield InputChunk(kind, (str(path),), bytes_read() - before, offset, content=rows, header=header)
                offset, before = offset + len(rows), bytes_read()
        if rest and header:  # the last row has no line break, or a quote that is never closed
            yield InputChunk(kind, (str(path),), bytes_read() - before, offset, content=rest, header=header)


def _csv_row_ends(content: bytes, path: Path, offset: int) -> list[int]:
    """Returns where each row ends in whole lines of a csv file, which begin with a row; not for a last row that goes on.

    Where a row ends is what ``csv.reader`` says: a quote has a meaning only in some places.
    """
    lines = list(io.StringIO(content.decode("latin-1"), newline=""))  # a character is a byte
    csv.field_size_limit(MAX_FIELD_BYTES)
    rows = csv.reader([*lines, "\n"], delimiter=csv_delimiter(path))  # the last line is one more row, or a part of the last row
    try:
        last_lines = [rows.line_num for _ in rows][:-1]
    except csv.Error as error:
        raise DataError(f"{path}, in the rows after byte {offset}: {error}") from error
    sizes = [0, *accumulate(map(len, lines))]
    return [sizes[line] for line in last_lines]


def csv_delimiter(path: Path) -> str:
    """Returns what is between the fields of a .csv or .tsv file."""
    return "\t" if format_suffix(path) == ".tsv" else ","


_SPLITTERS: dict[str, Callable[[str, Path, int], Iterator[InputChunk]]] = {
    "json": _whole_file,
    "jsonl": _by_bytes,
    "csv": _by_csv_rows,
    "sequential": _sequential,
    "parquet": _by_row_groups,
    "arrow": _by_batches,
}
