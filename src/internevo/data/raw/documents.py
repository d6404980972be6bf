"""Reads the raw documents of an input chunk: texts, or objects with named fields.

A document that cannot be read is returned as a ``DataError`` at its position among the others, so that the caller decides
whether to stop or to skip it.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import DataError
from ...wording import counted
from .files import arrow_batches, open_parquet, read_input
from .inputs import MAX_FIELD_BYTES, InputChunk, csv_delimiter


@dataclass(frozen=True)
class Document:
    """A raw document and where it is, for error messages."""

    value: Any
    """The text, or a dict of fields."""
    where: str
    """The file and the byte, line or row in it."""


TABLE_ROWS = 256
"""Number of rows of a parquet file that are decoded together."""
_ESCAPED = re.compile("[\udc80-\udcff]")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
"""In JSON: one of the two escapes that make a character outside of the first 65,536."""
Fields = tuple[str, ...] | None
"""Names of fields; None: all."""
DocumentOrError = Document | DataError
"""A document, or the reason why it cannot be read; both say where it is."""


def read_documents(chunk: InputChunk, fields: Fields) -> Iterator[DocumentOrError]:
    """Reads the documents of an input chunk, in the order of the file.

    Args:
        fields: the names of the fields that are needed. Of a parquet or arrow file, only these columns are read. None: all.
    """
    if chunk.error:
        yield DataError(chunk.error)
        return
    try:
        yield from _READERS[chunk.kind](chunk, fields)
    except DataError as error:  # the rest of the chunk cannot be read
        yield error


def _text_files(chunk: InputChunk, fields: Fields) -> Iterator[DocumentOrError]:
    for path in chunk.files:
        try:
            yield Document(decode_utf8(read_input(path), path), path)
        except DataError as error:
            yield error


def _json_file(chunk: InputChunk, fields: Fields) -> Iterator[DocumentOrError]:
    """Reads a file that holds one object or a list of objects."""
    path = chunk.files[0]
    text = decode_utf8(read_input(path), path)
    try:
        content = _parse_json(text, path)
    except DataError as error:
        raise DataError(f"{error}. It must be one object or one list; if each line is an object, name it .jsonl") from error
    for number, item in enumerate(content if isinstance(content, list) else [content]):
        yield _checked(Document(item, f"{path}, item {number}"), text, fields)


def _json_lines(chunk: InputChunk, fields: Fields) -> Iterator[DocumentOrError]:
    path = chunk.files[0]
    for offset, line in _lines(chunk):
        if not line.removeprefix(codecs.BOM_UTF8).strip():
            continue
        where = f"{path}, byte {offset}"
        try:
            text = decode_utf8(line, path, offset)
            yield _checked(Document(_parse_json(text, f"{where}: the line"), where), text, fields)
        except DataError as error:
            yield error


def _parse_json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"{what} is not JSON: {error}") from error
    except RecursionError:
        raise DataError(f"{what} is JSON that is nested too deep") from None


def _checked(document: Document, text: str, fields: Fields) -> DocumentOrError:
    """Returns a document of a JSON text, or an error if one of its ``fields`` is no text, because it has half a character."""
    if _SURROGATE.search(text):
        value = document.value
        needed = {name: value.get(name) for name in fields} if isinstance(value, dict) and fields is not None else value
        try:
            json.dumps(needed, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(error.object[error.start]):04x}"
            return DataError(f"{document.where}: the text has {half}, which is only half of a character (a lone surrogate)")
    return document


def _lines(chunk: InputChunk) -> Iterator[tuple[int, bytes]]:
    """Yields (byte offset, line) for each line that begins in the chunk's part of the file."""
    if chunk.content is not None:
        offset = chunk.start
        for line in io.BytesIO(chunk.content):
            yield offset, line
            offset += len(line)
        return
    try:
        with open(chunk.files[0], "rb") as file:
            if chunk.start:
                file.seek(chunk.start - 1)
                before = file.readline(chunk.stop - chunk.start + 1)  # this line began in the chunk before, and belongs to it
                if not before.endswith(b"\n"):
                    return  # the line continues after this chunk
            while (offset := file.tell()) < chunk.stop:
                yield offset, file.readline()
    except OSError as error:
        raise DataError(f"{chunk.files[0]} cannot be read: {error}") from error


def _csv_rows(chunk: InputChunk, fields: Fields) -> Iterator[DocumentOrError]:
    assert chunk.content is not None
    path = chunk.files[0]
    csv.field_size_limit(MAX_FIELD_BYTES)
    delimiter = csv_delimiter(Path(path))
    header = io.StringIO(decode_utf8(chunk.header, path), newline="")
    names = next(csv.reader(header, delimiter=delimiter), [])
    # Invalid bytes are kept as escapes while the file is parsed, so that only the row that has them is an error.
    rows = csv.reader(io.StringIO(chunk.content.decode("utf-8", "surrogateescape"), newline=""), delimiter=delimiter)
    try:
        for row in rows:
            where = f"{path}, line {rows.line_num} after byte {chunk.start}"
            if row and len(row) != len(names):
                yield DataError(f"{where}: the row has {counted(len(row), 'field')}, but the header has {len(names)}")
            elif any(_ESCAPED.search(value) for value in row):
                yield DataError(f"{where}: the row is not UTF-8")
            elif row:
                yield Document(dict(zip(names, row, strict=True)), where)
    except csv.Error as error:
        raise DataError(f"{path}, line {rows.line_num} after byte {chunk.start}: {error}") from error


def _parquet_rows(chunk: InputChunk, fields: Fields) -> Iterator[DocumentOrError]:
    import pyarrow

    path, group = chunk.files[0], chunk.table
    file = open_parquet(path)
    columns = _columns(file.schema_arrow.names, fields, path)
    first = 0
    try:
        for batch in file.iter_batches(TABLE_ROWS, [group], columns):
            part = batch.slice(max(chunk.start - first, 0), max(chunk.stop - max(chunk.start, first), 0))
            if first + len(batch) > chunk.start:
                yield from _table_rows(part, f"{path}, row group {group}", max(chunk.start, first))
            first += len(batch)
            if first >= chunk.stop:
                return
    except (pyarrow.ArrowException, OSError) as error:
        yield DataError(f"{path}, row group {group} cannot be read: {error}")


def _arrow_rows(chunk: InputChunk, fields: Fields) -> Iterator[DocumentOrError]:
    path = chunk.files[0]
    batch = arrow_batches(path)[chunk.table].slice(chunk.start, chunk.stop - chunk.start)
    table = batch.select(_columns(batch.schema.names, fields, path))
    yield from _table_rows(table, f"{path}, record batch {chunk.table}", chunk.start)


def _table_rows(table: Any, where: str, first: int) -> Iterator[DocumentOrError]:
    """Yields each row of a pyarrow table or record batch; ``first`` is the number of its first row."""
    import pyarrow

    names = table.schema.names
    for number, values in enumerate(zip(*table.columns, strict=True), start=first):
        where_row = f"{where}, row {number}"
        try:
            yield Document({name: value.as_py() for name, value in zip(names, values, strict=True)}, where_row)
        except (pyarrow.ArrowException, UnicodeDecodeError) as error:
            yield DataError(f"{where_row} cannot be read: {error}")


def _columns(names: list[str], fields: Fields, path: str) -> list[str]:
    """Returns those of ``fields`` that are columns of the file; all columns if ``fields`` is None."""
    if fields is None:
        return names
    found = [name for name in fields if name in names]
    if not found:
        raise DataError(f"{path} has none of the columns {', '.join(map(repr, fields))} (it has {', '.join(map(repr, names))})")
    return found


_READERS: dict[str, Callable[[InputChunk, Fields], Iterator[DocumentOrError]]] = {
    "text": _text_files,
    "json": _json_file,
    "jsonl": _json_lines,
    "csv": _csv_rows,
    "parquet": _parquet_rows,
    "arrow": _arrow_rows,
}


def decode_utf8(content: bytes, path: str, offset: int = 0) -> str:
    """Decodes UTF-8, without the byte order mark at the beginning, if there is one.

    Args:
        path: the file that ``content`` is from, for the error message.
        offset: the byte at which ``content`` begins in the file.

    Raises:
        DataError: if a byte is invalid; the message gives its offset in the file.
    """
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        advice = ": it is UTF-16, convert it" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else ""
        raise DataError(f"{path} is not UTF-8 at byte {offset + error.start} (0x{content[error.start]:02x}){advice}") from None
