"""Raw documents, from a job's files: text, or objects with named fields.

What cannot be read comes as a ``DataError`` in its place, so that the caller chooses to stop or to go on.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import DataError
from .files import arrow_batches, open_parquet, read_input, suffix
from .inputs import Job


@dataclass(frozen=True)
class Document:
    """A raw document and its place, for messages."""

    value: Any
    """Text, or a dict of fields."""
    where: str


TABLE_ROWS = 256
"""Rows of a parquet file that are unpacked together."""
_ESCAPED = re.compile("[\udc80-\udcff]")
Found = Document | DataError
"""A document, or why there is none; with its place."""


def documents(job: Job, fields: tuple[str, ...]) -> Iterator[Found]:
    """The documents of a job.

    Args:
        fields: that are wanted: of these, the columns that a parquet or arrow file has are read.
    """
    if job.error:
        yield DataError(job.error)
        return
    try:
        yield from _READERS[job.kind](job, fields)
    except DataError as error:  # the rest of the job is lost
        yield error


def _text_files(job: Job, fields: tuple[str, ...]) -> Iterator[Found]:
    for path in job.files:
        try:
            yield Document(decode(read_input(path), path), path)
        except DataError as error:
            yield error


def _json_file(job: Job, fields: tuple[str, ...]) -> Iterator[Found]:
    """One object, or a list of them."""
    path = job.files[0]
    try:
        content = json.loads(decode(read_input(path), path))
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    for number, item in enumerate(content if isinstance(content, list) else [content]):
        yield Document(item, f"{path}, item {number}")


def _json_lines(job: Job, fields: tuple[str, ...]) -> Iterator[Found]:
    path = job.files[0]
    for offset, line in _lines(job):
        if not line.strip():
            continue
        where = f"{path}, byte {offset}"
        try:
            yield Document(json.loads(decode(line, path, offset)), where)
        except DataError as error:
            yield error
        except ValueError as error:
            yield DataError(f"{where}: the line is not JSON: {error}")


def _lines(job: Job) -> Iterator[tuple[int, bytes]]:
    """(byte, line) of the lines that begin in the job's part of the file."""
    if job.content is not None:
        offset = job.start
        for line in io.BytesIO(job.content):
            yield offset, line
            offset += len(line)
        return
    try:
        with open(job.files[0], "rb") as file:
            if job.start:
                file.seek(job.start - 1)
                before = file.readline(job.stop - job.start + 1)  # the line that began before belongs to the job before
                if not before.endswith(b"\n"):
                    return  # and goes on behind this one
            while (offset := file.tell()) < job.stop:
                yield offset, file.readline()
    except OSError as error:
        raise DataError(f"{job.files[0]} cannot be read: {error}") from error


def _csv_rows(job: Job, fields: tuple[str, ...]) -> Iterator[Found]:
    assert job.content is not None
    path = job.files[0]
    csv.field_size_limit(sys.maxsize)
    delimiter = "\t" if suffix(Path(path)) == ".tsv" else ","
    names = next(csv.reader([decode(job.header, path).lstrip("\ufeff")], delimiter=delimiter), [])
    # What is not UTF-8 spoils its own row only.
    rows = csv.reader(io.StringIO(job.content.decode("utf-8", "surrogateescape"), newline=""), delimiter=delimiter)
    try:
        for row in rows:
            where = f"{path}, line {rows.line_num} behind byte {job.start}"
            if row and len(row) != len(names):
                yield DataError(f"{where}: {len(row)} fields, and the header names {len(names)}")
            elif any(_ESCAPED.search(value) for value in row):
                yield DataError(f"{where}: the row is not UTF-8")
            elif row:
                yield Document(dict(zip(names, row, strict=True)), where)
    except csv.Error as error:
        raise DataError(f"{path}, line {rows.line_num} behind byte {job.start}: {error}") from error


def _parquet_rows(job: Job, fields: tuple[str, ...]) -> Iterator[Found]:
    import pyarrow

    path, group = job.files[0], job.table
    file = open_parquet(path)
    columns = _columns(file.schema_arrow.names, fields, path)
    first = 0
    try:
        for batch in file.iter_batches(TABLE_ROWS, [group], columns):
            part = batch.slice(max(job.start - first, 0), max(job.stop - max(job.start, first), 0))
            if first + len(batch) > job.start:
                yield from _table_rows(part, f"{path}, row group {group}", max(job.start, first))
            first += len(batch)
            if first >= job.stop:
                return
    except (pyarrow.ArrowException, OSError) as error:
        yield DataError(f"{path}, row group {group} cannot be read: {error}")


def _arrow_rows(job: Job, fields: tuple[str, ...]) -> Iterator[Found]:
    path = job.files[0]
    batch = arrow_batches(path)[job.table].slice(job.start, job.stop - job.start)
    table = batch.select(_columns(batch.schema.names, fields, path))
    yield from _table_rows(table, f"{path}, record batch {job.table}", job.start)


def _table_rows(table: Any, where: str, first: int) -> Iterator[Found]:
    import pyarrow

    names = table.schema.names
    for number, values in enumerate(zip(*table.columns, strict=True), start=first):
        place = f"{where}, row {number}"
        try:
            yield Document({name: value.as_py() for name, value in zip(names, values, strict=True)}, place)
        except (pyarrow.ArrowException, UnicodeDecodeError) as error:
            yield DataError(f"{place} cannot be read: {error}")


def _columns(names: list[str], fields: tuple[str, ...], path: str) -> list[str]:
    found = [name for name in fields if name in names]
    if not found:
        raise DataError(f"{path} has none of the columns {', '.join(map(repr, fields))} (it has {', '.join(map(repr, names))})")
    return found


_READERS: dict[str, Callable[[Job, tuple[str, ...]], Iterator[Found]]] = {
    "text": _text_files,
    "json": _json_file,
    "jsonl": _json_lines,
    "csv": _csv_rows,
    "parquet": _parquet_rows,
    "arrow": _arrow_rows,
}


def decode(content: bytes, path: str, offset: int = 0) -> str:
    """UTF-8, or an error with the byte's position in the file."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 at byte {offset + error.start} (0x{content[error.start]:02x})") from None
