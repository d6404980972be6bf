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
    return DataError(f"{document.where} has no {what} under {' or '.join(map(repr, fields))} (it has {has}){advice}")
