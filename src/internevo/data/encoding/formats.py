"""The formats of raw documents: plain text, Alpaca instructions and chats; and which of their tokens are predicted.

Documents are encoded to signed ids: a negative id is a masked token, which is not predicted (see ``tokenized/files.py``).

| format | the fields of a document                               | what is predicted             |
|--------|--------------------------------------------------------|-------------------------------|
| text   | content or text                                        | all of it                     |
| alpaca | instruction, input, output                             | the output                    |
| chat   | messages (role, content) or conversations (from, value)| the assistant's messages      |
| chat   | instruction, input, output                             | the output                    |

``alpaca`` is the original InternEvo's template, and ``chat`` is the tokenizer's own chat template.

A field that has a meaning for the model ("system", "history", ...) and would not be used is an error that names it. All other
fields ("id", ...) are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import numpy as np

from ...config.data import TEMPLATE_DATE
from ...errors import DataError, UsageError
from ...text.tokenizer import Tokenizer
from ..raw.documents import Document
from .chats import encode_chats
from .messages import CHAT_VALUES, question_of
from .shared import CHAT_FIELDS, INSTRUCTION_FIELDS, IdsOrError, mask, missing_field

FormatName = Literal["text", "alpaca", "chat"]
TEXT_FIELDS = ("content", "text")
"""The fields that are looked for in a document, in this order."""
ALPACA_REFUSED = ("system", "history")
"""Fields that other templates for instructions use. InternEvo's has no place for them."""
END_OF_ANSWER = "<eoa>"
"""The token that ends the output in the Alpaca template."""


def check_format(name: str) -> None:
    """Checks the name of a format.

    Raises:
        UsageError: if there is no such format.
    """
    if name not in get_args(FormatName):
        raise UsageError(f"format = {name!r} must be one of: {', '.join(get_args(FormatName))}")


def format_fields(name: FormatName, key: str | None) -> tuple[str, ...]:
    """Returns the fields that are looked for in a document of a format.

    Args:
        key: the field that has the text or the messages; None: the usual fields.
    """
    if name == "alpaca":
        return INSTRUCTION_FIELDS
    return (key,) if key else (CHAT_FIELDS if name == "chat" else TEXT_FIELDS)


def read_fields(name: FormatName, key: str | None) -> tuple[str, ...]:
    """Returns all fields that documents of a format may have; see ``format_fields``."""
    more: dict[FormatName, tuple[str, ...]] = {
        "text": (), "alpaca": ALPACA_REFUSED, "chat": (*INSTRUCTION_FIELDS, *CHAT_VALUES),
    }  # fmt: skip
    return (*format_fields(name, key), *more[name])


def encode_documents(
    name: FormatName, documents: list[Document], key: str | None, tokenizer: Tokenizer, today: str = TEMPLATE_DATE
) -> list[IdsOrError]:
    """Encodes documents of a format. Returns the signed ids of each; an empty array if there is nothing to train on.

    Args:
        key: the field that has the text or the messages; None: the usual fields.
        today: the date (YYYY-MM-DD) that a chat template takes for today.
    """
    encoders: dict[FormatName, Callable[[list[Document], str | None, Tokenizer], list[IdsOrError]]] = {
        "text": _encode_texts, "alpaca": _encode_instructions, "chat": partial(encode_chats, today=today),
    }  # fmt: skip
    return encoders[name](documents, key, tokenizer)


def _encode_texts(documents: list[Document], key: str | None, tokenizer: Tokenizer) -> list[IdsOrError]:
    """Encodes texts, each between the tokens that begin and end a document."""
    texts = [document_text(document, key) for document in documents]
    encoded = iter(tokenizer.backend.encode_batch([text for text in texts if isinstance(text, str)]))
    results: list[IdsOrError] = []
    for text in texts:
        if isinstance(text, str):
            ids = next(encoded)
            results.append(np.array([*tokenizer.bos, *ids, *tokenizer.eos] if ids else [], np.int32))
        else:
            results.append(text)
    return results


def document_text(document: Document, key: str | None) -> str | DataError:
    """Returns the text of a document, or an error if it has none.

    Args:
        key: the field that has the text; None: the document is itself a text, or has one in one of ``TEXT_FIELDS``.
    """
    value = document.value
    if isinstance(value, str) and key is None:
        return value
    fields = format_fields("text", key)
    if isinstance(value, dict):
        for field in fields:
            if isinstance(value.get(field), str):
                return str(value[field])
    return missing_field(document, "text", fields)


# Alpaca --------------------------------------------------------------------------------------------------------------


def _encode_instructions(documents: list[Document], key: str | None, tokenizer: Tokenizer) -> list[IdsOrError]:
    """Encodes Alpaca instructions with the original InternEvo's template.

    The template is ``<|User|>:`` instruction and input ``<eoh>``, ``<|Bot|>:`` output ``<eoa>``. The output is predicted. A
    tokenizer that does not have the tokens ``<eoh>`` and ``<eoa>`` encodes them as text.
    """
    return [_encode_instruction(document, tokenizer) for document in documents]


def _encode_instruction(document: Document, tokenizer: Tokenizer) -> IdsOrError:
    value = document.value if isinstance(document.value, dict) else {}
    instruction, input_, output = (value.get(field) or "" for field in INSTRUCTION_FIELDS)
    if not instruction or not output:
        return missing_field(document, "instruction and output", ("instruction", "output"), option=False)
    if not all(isinstance(text, str) for text in (instruction, input_, output)):
        return missing_field(document, "texts", INSTRUCTION_FIELDS, option=False)
    try:
        check_alpaca(value, document.where)
    except DataError as error:
        return error
    question = alpaca_question(question_of(instruction, input_), tokenizer)
    answer = [*tokenizer.encode(output), *_token_ids(END_OF_ANSWER, tokenizer), *_newline(tokenizer)]
    return np.array([*tokenizer.bos, *mask(question), *answer, *tokenizer.eos], np.int32)


def check_alpaca(fields: dict[str, Any], where: str) -> None:
    """Checks that InternEvo's template has a place for all fields of an instruction that have a meaning for a model.

    Raises:
        DataError: if it has none for one of them.
    """
    for field in ALPACA_REFUSED:
        if fields.get(field):
            raise DataError(f"{where}: the format alpaca does not use {field!r}; write it as a chat (--format chat)")


def alpaca_question(question: str, tokenizer: Tokenizer) -> list[int]:
    """Returns the ids of an Alpaca instruction up to where the output begins."""
    end = [*_token_ids("<eoh>", tokenizer), *_newline(tokenizer)]
    return [*tokenizer.encode(f"<|User|>:{question}"), *end, *tokenizer.encode("<|Bot|>:")]


def _newline(tokenizer: Tokenizer) -> list[int]:
    return tokenizer.encode("\n")[-1:]  # SentencePiece puts a space in front


def _token_ids(name: str, tokenizer: Tokenizer) -> list[int]:
    """Returns the id of a special token, or the ids of its name as text if the tokenizer does not have it."""
    found = tokenizer.backend.token_id(name)
    return tokenizer.encode(name) if found is None else [found]
