"""What the formats of documents share: signed ids, and the error for a document without its fields."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ...errors import DataError
from ..raw.documents import Document
from ..tokenized.files import MASKED_ZERO

SignedIds = npt.NDArray[np.int32]
IdsOrError = SignedIds | DataError
"""The signed ids of a document, or the reason why it cannot be encoded."""

CHAT_FIELDS = ("messages", "conversations")
"""The fields of a chat that are looked for in a document, in this order."""
INSTRUCTION_FIELDS = ("instruction", "input", "output")
"""The fields of an instruction; the input may be empty."""


def mask(ids: list[int]) -> list[int]:
    """Returns the signed ids of masked tokens."""
    return [-id_ if id_ else MASKED_ZERO for id_ in ids]


def missing_field(document: Document, what: str, fields: tuple[str, ...], option: bool = True) -> DataError:
    """Returns an error that says which fields a document has instead of ``fields``, or which of them is empty.

    Args:
        what: what the fields would hold.
        option: whether the field may have another name, which an option gives.
    """
    value = document.value
    has = type(value).__name__
    if isinstance(value, dict):
        empty = [field for field in fields if value.get(field) in ("", [])]
        if empty:
            return DataError(f"{document.where}: {empty[0]!r} is empty")
        has = ", ".join(f"{k!r} ({type(v).__name__})" if k in fields else repr(k) for k, v in value.items())
    advice = "; give the field's name with --text-key (in a config: data.content_name)" if option else ""
    if other := _other_format(value, fields):
        advice = f"; give --format {other} (in a config: data.format = {other!r})"
    return DataError(f"{document.where} has no {what} under {' or '.join(map(repr, fields))} (it has {has}){advice}")


def _other_format(value: object, fields: tuple[str, ...]) -> str:
    """Returns the format whose fields a document has, of those that do not look for ``fields``; empty if there is none."""
    if not isinstance(value, dict) or any(field in value for field in fields):
        return ""
    if any(isinstance(value.get(field), list) for field in CHAT_FIELDS):
        return "chat"
    return "alpaca" if {"instruction", "output"} <= value.keys() else ""
