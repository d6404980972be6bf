"""The text of raw documents, from a job's files."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import DataError
from .inputs import Job, open_parquet, read_input, suffix

TEXT_KEYS = ("content", "text")


def texts(job: Job, key: str | None) -> Iterator[str]:
    """The text of each document of a job.

    Args:
        key: of the text in JSON, or its column; by default one of ``TEXT_KEYS``.

    Raises:
        DataError: naming file, line or byte, when a text is not UTF-8, a line not JSON, or the key not there.
    """
    readers = {"text": _text_files, "json": _json_file, "jsonl": _json_lines, "csv": _csv_rows, "parquet": _parquet_rows}
    yield from readers[job.kind](job, key)


def _text_files(job: Job, key: str | None) -> Iterator[str]:
    for path in job.files:
        yield decode(read_input(path), path)


def _json_file(job: Job, key: str | None) -> Iterator[str]:
    """One object, or a list of them."""
    path = job.files[0]
    try:
        content = json.loads(decode(read_input(path), path))
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    for number, item in enumerate(content if isinstance(content, list) else [content]):
        yield text_of(item, key, f"{path}, item {number}")


def _json_lines(job: Job, key: str | None) -> Iterator[str]:
    path = job.files[0]
    for offset, line in _lines(job):
        if not line.strip():
            continue
        where = f"{path}, byte {offset}"
        try:
            item = json.loads(decode(line, path, offset))
        except ValueError as error:
            raise DataError(f"{where}: the line is not JSON: {error}") from error
        yield text_of(item, key, where)


def _lines(job: Job) -> Iterator[tuple[int, bytes]]:
    """(byte, line) of the lines that begin in the job's part of the file."""
    if job.content is not None:
        offset = job.start
        for line in io.BytesIO(job.content):
            yield offset, line
            offset += len(line)
        return
    with open(job.files[0], "rb") as file:
        if job.start:
            file.seek(job.start - 1)
            file.readline()  # the line that began before belongs to the job before
        while (offset := file.tell()) < job.stop:
            yield offset, file.readline()


def _csv_rows(job: Job, key: str | None) -> Iterator[str]:
    assert job.content is not None
    path = job.files[0]
    csv.field_size_limit(sys.maxsize)
    delimiter = "\t" if suffix(Path(path)) == ".tsv" else ","
    names = next(csv.reader([decode(job.header, path).lstrip("\ufeff")], delimiter=delimiter), [])
    column = names.index(_column(names, key, path))
    rows = csv.reader(io.StringIO(decode(job.content, path, job.start), newline=""), delimiter=delimiter)
    try:
        for row in rows:
            if row and len(row) != len(names):
                raise csv.Error(f"{len(row)} fields, and the header names {len(names)}")
            if row:
                yield row[column]
    except csv.Error as error:
        raise DataError(f"{path}, line {rows.line_num} behind byte {job.start}: {error}") from error


def _parquet_rows(job: Job, key: str | None) -> Iterator[str]:
    import pyarrow

    path = job.files[0]
    file = open_parquet(path)
    column = _column(file.schema_arrow.names, key, path)
    for group in range(job.start, job.stop):
        try:
            values = file.read_row_group(group, columns=[column])[column]
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{path}, row group {group} cannot be read: {error}") from error
        for number, value in enumerate(values):
            text = value.as_py()
            if not isinstance(text, str):
                raise DataError(f"{path}, row group {group}, row {number}: {column!r} is {type(text).__name__}, not text")
            yield text


def _column(names: list[str], key: str | None, path: str) -> str:
    keys = (key,) if key else TEXT_KEYS
    for name in keys:
        if name in names:
            return name
    has = ", ".join(map(repr, names))
    raise DataError(f"{path} has no column {' or '.join(map(repr, keys))} (it has {has}); give --text-key")


def decode(content: bytes, path: str, offset: int = 0) -> str:
    """UTF-8, or an error with the byte's position in the file."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 at byte {offset + error.start} (0x{content[error.start]:02x})") from None


def text_of(item: Any, key: str | None, where: str) -> str:
    """The text of one JSON object."""
    if isinstance(item, str) and key is None:
        return item
    keys = (key,) if key else TEXT_KEYS
    for name in keys:
        if isinstance(item, dict) and isinstance(item.get(name), str):
            return str(item[name])
    has = ", ".join(map(repr, item)) if isinstance(item, dict) else type(item).__name__
    raise DataError(f"{where} has no text under {' or '.join(map(repr, keys))} (it has {has}); give --text-key")
