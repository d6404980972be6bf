"""Describes raw data: its columns and their kinds, lengths, some documents, and the format that fits."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import DataError
from ...wording import counted
from ..raw.documents import Document, read_documents
from ..raw.inputs import split_files
from .formats import TEXT_FIELDS, FormatName
from .shared import CHAT_FIELDS, INSTRUCTION_FIELDS

READ_BYTES = 32 << 20
"""The most bytes of files that are read; of larger data, the beginning of each file."""
SHOWN = 160
"""The longest text of a field that is shown, in characters."""


@dataclass
class RawData:
    """What the files of a dataset have, as far as they have been read."""

    files: list[tuple[str, Path]]
    documents: list[Document] = field(default_factory=list)
    errors: list[DataError] = field(default_factory=list)
    """Documents that cannot be read."""
    whole: bool = True
    """Whether all has been read."""
    size: int = 0
    """How much has been read, in bytes of the files."""

    @property
    def count(self) -> int:
        """The number of documents; an estimate, if not all has been read."""
        total = sum(path.stat().st_size for _, path in self.files)
        return len(self.documents) if self.whole else int(len(self.documents) * total / max(self.size, 1))

    @classmethod
    def read(cls, files: list[tuple[str, Path]]) -> RawData:
        """Reads files, given as (kind, path): all of them if they are small, or else the first chunk of each."""
        found, left = cls(files), READ_BYTES
        for kind, path in files:
            for number, chunk in enumerate(split_files([(kind, path)])):
                left -= max(chunk.size, 1)
                if left < 0 and number:
                    found.whole = False
                    break
                found.size += chunk.size
                for document in read_documents(chunk, None):
                    if isinstance(document, DataError):
                        found.errors.append(document)
                    else:
                        found.documents.append(document)
            if left < -READ_BYTES and path != files[-1][1]:
                found.whole = False
                break
        return found

    def fields(self) -> dict[str, dict[str, list[int]]]:
        """Returns the name of each field -> the kind of its values -> their lengths. A document that is a text has none."""
        found: dict[str, dict[str, list[int]]] = {}
        for document in self.documents:
            for name, value in document.value.items() if isinstance(document.value, dict) else ():
                length = len(value) if isinstance(value, str | list | dict) else 0
                found.setdefault(str(name), {}).setdefault(_kind(value), []).append(length)
        return found

    def format(self, key: str | None = None) -> FormatName | None:
        """Returns the format that most documents have; None if there is none.

        Args:
            key: the field that has the text or the messages; None: the usual fields.
        """
        if key is not None:
            return (
                "chat"
                if any(isinstance(d.value, dict) and isinstance(d.value.get(key), list) for d in self.documents)
                else "text"
            )
        counts = {name: sum(fits(name, document) for document in self.documents) for name in ("chat", "alpaca", "text")}
        best = max(counts, key=lambda name: counts[name])
        return best if counts[best] else None  # type: ignore[return-value]


def fits(name: str, document: Document) -> bool:
    """Whether a document has the fields of a format."""
    value = document.value
    if isinstance(value, list):
        return name == "chat" and bool(value) and isinstance(value[0], dict)
    if not isinstance(value, dict):
        return name == "text" and isinstance(value, str)
    if name == "chat":
        return any(isinstance(value.get(key), list) and value[key] for key in CHAT_FIELDS)
    if name == "alpaca":
        return all(isinstance(value.get(key), str) for key in (INSTRUCTION_FIELDS[0], INSTRUCTION_FIELDS[-1]))
    return any(isinstance(value.get(key), str) for key in TEXT_FIELDS)


def needs(name: str) -> str:
    """Says which fields a format needs."""
    return {
        "chat": f"a list in {' or '.join(CHAT_FIELDS)}",
        "alpaca": f"texts in {', '.join(INSTRUCTION_FIELDS)} (the input may be empty or left out)",
        "text": f"a text in {' or '.join(TEXT_FIELDS)}, or in the field of --text-key",
    }[name]


def describe_raw(root: Path, files: list[tuple[str, Path]], examples: int = 3) -> Iterator[str]:
    """Yields lines of text that describe raw data.

    Args:
        files: (kind, path) of each file.
        examples: number of documents to show.

    Raises:
        DataError: if a document cannot be read. All others are described before.
    """
    raw = RawData.read(files)
    kinds = ", ".join(sorted({kind for kind, _ in files}))
    size = sum(path.stat().st_size for _, path in files)
    count = counted(len(raw.documents), "document") + ("" if raw.whole else " in the part that was read")
    yield f"raw data {root}: {counted(len(files), 'file')} ({kinds}), {size / 1e6:,.1f} MB; {count}"
    yield from _describe_fields(raw)
    for document in raw.documents[:examples]:
        yield f"--- {document.where}"
        yield _short(document.value)
    name = raw.format()
    if name is None:
        yield "no format fits: " + "; ".join(f"{known} needs {needs(known)}" for known in ("chat", "alpaca", "text"))
    else:
        fit = sum(fits(name, document) for document in raw.documents)
        of = "" if fit == len(raw.documents) else f" for {fit:,} of {counted(len(raw.documents), 'document')}"
        notes = {
            "alpaca": " (or chat, with the tokenizer's chat template)",
            "text": " of internevo finetune; internevo tokenize needs no --format",  # which there means plain text files
        }
        yield f"fits --format {name}{notes.get(name, '')}{of}"
    if raw.errors:
        raise DataError(f"{counted(len(raw.errors), 'document')} cannot be read; the first: {raw.errors[0]}")


def _describe_fields(raw: RawData) -> Iterator[str]:
    fields = raw.fields()
    width = max([12, *map(len, fields)])
    for name, kinds in fields.items():
        for kind, lengths in kinds.items():
            unit = {"text": "characters", "list": "items", "object": "keys"}.get(kind)
            sizes = f", {unit}: {_spread(lengths)}" if unit else ""
            yield f"  {name:<{width}}  {kind:<8} {len(lengths):>9,} times{sizes}"
    texts = [len(document.value) for document in raw.documents if isinstance(document.value, str)]
    if texts:
        yield f"  texts, characters: {_spread(texts)}"


def _spread(lengths: list[int]) -> str:
    return f"median {np.median(lengths):,.0f}, 95% {np.percentile(lengths, 95):,.0f}, longest {max(lengths):,}"


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    kinds = {str: "text", bool: "flag", int: "number", float: "number", list: "list", dict: "object"}
    return kinds.get(type(value), type(value).__name__)


def _short(value: Any) -> str:
    """Returns a document in which long texts are shortened."""

    def cut(item: Any) -> Any:
        if isinstance(item, str):
            return item if len(item) <= SHOWN else f"{item[: SHOWN - 3]}..."
        if isinstance(item, dict):
            return {key: cut(inner) for key, inner in item.items()}
        return [cut(inner) for inner in item[:6]] + ["..."] * (len(item) > 6) if isinstance(item, list) else item

    short = cut(value)
    return short if isinstance(short, str) else json.dumps(short, ensure_ascii=False, default=str)
