"""The formats of raw documents: plain text, Alpaca instructions and chats; and which of their tokens are predicted.

Documents are encoded to signed ids: a negative id is a masked token, which is not predicted (see ``tokenized/files.py``).

| format | the fields of a document                               | what is predicted             |
|--------|--------------------------------------------------------|-------------------------------|
| text   | content or text                                        | all of it                     |
| alpaca | instruction, input, output                             | the output                    |
| chat   | messages (role, content) or conversations (from, value)| the assistant's messages      |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ...errors import DataError
from ...text.chat import ChatTemplate
from ...text.tokenizer import Tokenizer
from ..raw.documents import Document
from ..tokenized.files import MASKED_ZERO

FormatName = Literal["text", "alpaca", "chat"]
TEXT_FIELDS = ("content", "text")
ALPACA_FIELDS = ("instruction", "input", "output")
CHAT_FIELDS = ("messages", "conversations")
"""The fields that are looked for in a document, in this order."""
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
"""Names of roles in chats, and the name that chat templates have for each."""
END_OF_ANSWER = "<eoa>"
"""The token that ends the output in the Alpaca template."""

SignedIds = npt.NDArray[np.int32]
IdsOrError = SignedIds | DataError
"""The signed ids of a document, or the reason why it cannot be encoded."""


def format_fields(name: FormatName, key: str | None) -> tuple[str, ...]:
    """Returns the fields that are looked for in a document of a format.

    Args:
        key: the field that has the text or the messages; None: the usual fields.
    """
    if name == "alpaca":
        return ALPACA_FIELDS
    return (key,) if key else (CHAT_FIELDS if name == "chat" else TEXT_FIELDS)


def encode_documents(name: FormatName, documents: list[Document], key: str | None, tokenizer: Tokenizer) -> list[IdsOrError]:
    """Encodes documents of a format. Returns the signed ids of each; an empty array if there is nothing to train on.

    Args:
        key: the field that has the text or the messages; None: the usual fields.
    """
    encoders: dict[FormatName, Callable[[list[Document], str | None, Tokenizer], list[IdsOrError]]] = {
        "text": _encode_texts, "alpaca": _encode_instructions, "chat": _encode_chats,
    }  # fmt: skip
    return encoders[name](documents, key, tokenizer)


def encode_prompt(name: FormatName, text: str, tokenizer: Tokenizer) -> tuple[list[int], set[int]]:
    """Encodes the text that a model continues, or the question that it answers.

    Returns:
        The ids up to where the answer begins, and the ids that end the answer.
    """
    stop_ids = set() if tokenizer.eos_id is None else {tokenizer.eos_id}
    if name == "text":
        return tokenizer.with_bos(text), stop_ids
    if name == "alpaca":
        end = tokenizer.backend.token_id(END_OF_ANSWER)
        return [*_bos_eos(tokenizer)[0], *_encode_question(text, tokenizer)], stop_ids | (set() if end is None else {end})
    template = ChatTemplate.load(tokenizer)
    question = [{"role": "user", "content": text}]
    answered = template.render([*question, {"role": "assistant", "content": "x"}])
    after_answer = tokenizer.encode(answered[answered.rindex("x") + 1 :])
    end = next((id_ for id_ in after_answer if tokenizer.decode([id_]).strip()), None)
    return tokenizer.encode(template.render(question, prompt=True)), stop_ids | (set() if end is None else {end})


def _mask(ids: list[int]) -> list[int]:
    """Returns the signed ids of masked tokens."""
    return [-id_ if id_ else MASKED_ZERO for id_ in ids]


def _bos_eos(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Returns the ids that begin a document, and those that end it: none or one of each."""
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    return [] if bos is None else [bos], [] if eos is None else [eos]


def _encode_texts(documents: list[Document], key: str | None, tokenizer: Tokenizer) -> list[IdsOrError]:
    """Encodes texts, each between the tokens that begin and end a document."""
    texts = [document_text(document, key) for document in documents]
    encoded = iter(tokenizer.backend.encode_batch([text for text in texts if isinstance(text, str)]))
    bos, eos = _bos_eos(tokenizer)
    results: list[IdsOrError] = []
    for text in texts:
        if isinstance(text, str):
            ids = next(encoded)
            results.append(np.array([*bos, *ids, *eos] if ids else [], np.int32))
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
    return _missing_field(document, "text", fields)


def _missing_field(document: Document, what: str, fields: tuple[str, ...]) -> DataError:
    """Returns an error that says which fields a document has instead of ``fields``."""
    value = document.value
    has = type(value).__name__
    if isinstance(value, dict):
        has = ", ".join(f"{k!r} ({type(v).__name__})" if k in fields else repr(k) for k, v in value.items())
    advice = "; give the field's name with --text-key (in a config: data.content_name)" if fields != ALPACA_FIELDS else ""
    return DataError(f"{document.where} has no {what} under {' or '.join(map(repr, fields))} (it has {has}){advice}")


# Alpaca --------------------------------------------------------------------------------------------------------------


def _encode_instructions(documents: list[Document], key: str | None, tokenizer: Tokenizer) -> list[IdsOrError]:
    """Encodes Alpaca instructions with the original InternEvo's template.

    The template is ``<|User|>:`` instruction and input ``<eoh>``, ``<|Bot|>:`` output ``<eoa>``. The output is predicted. A
    tokenizer that does not have the tokens ``<eoh>`` and ``<eoa>`` encodes them as text.
    """
    return [_encode_instruction(document, tokenizer) for document in documents]


def _encode_instruction(document: Document, tokenizer: Tokenizer) -> IdsOrError:
    value = document.value if isinstance(document.value, dict) else {}
    instruction, input_, output = (value.get(field, "") for field in ALPACA_FIELDS)
    if not (isinstance(instruction, str) and isinstance(output, str) and instruction and output):
        return _missing_field(document, "instruction and output", ALPACA_FIELDS)
    bos, eos = _bos_eos(tokenizer)
    question = _encode_question(f"{instruction}\n{input_}" if input_ else instruction, tokenizer)
    answer = [*tokenizer.encode(output), *_token_ids(END_OF_ANSWER, tokenizer), *_newline(tokenizer)]
    return np.array([*bos, *_mask(question), *answer, *eos], np.int32)


def _encode_question(question: str, tokenizer: Tokenizer) -> list[int]:
    """Returns the ids of an Alpaca instruction up to where the output begins."""
    end = [*_token_ids("<eoh>", tokenizer), *_newline(tokenizer)]
    return [*tokenizer.encode(f"<|User|>:{question}"), *end, *tokenizer.encode("<|Bot|>:")]


def _newline(tokenizer: Tokenizer) -> list[int]:
    return tokenizer.encode("\n")[-1:]  # SentencePiece puts a space in front


def _token_ids(name: str, tokenizer: Tokenizer) -> list[int]:
    """Returns the id of a special token, or the ids of its name as text if the tokenizer does not have it."""
    found = tokenizer.backend.token_id(name)
    return tokenizer.encode(name) if found is None else [found]


# Chats ---------------------------------------------------------------------------------------------------------------


def _encode_chats(documents: list[Document], key: str | None, tokenizer: Tokenizer) -> list[IdsOrError]:
    """Encodes chats with the tokenizer's chat template.

    What the template adds for a message of the assistant after its prompt is predicted: the message and the token that ends it.
    """
    template = ChatTemplate.load(tokenizer)
    return [_encode_chat(document, key, tokenizer, template) for document in documents]


def _encode_chat(document: Document, key: str | None, tokenizer: Tokenizer, template: ChatTemplate) -> IdsOrError:
    try:
        messages = _messages(document, key)
        turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns:
            raise DataError(f"{document.where} has no message of the assistant, so there is nothing to predict")
        text = template.render(messages)
        spans = [_assistant_span(text, messages, turn, template, document.where) for turn in turns]
    except DataError as error:
        return error
    whole, *prefixes = tokenizer.backend.encode_batch([text, *(text[:end] for span in spans for end in span)])
    ids = _mask(whole)
    for up_to_start, up_to_end in zip(prefixes[::2], prefixes[1::2], strict=True):
        start, stop = _common_length(whole, up_to_start), _common_length(whole, up_to_end)
        ids[start:stop] = whole[start:stop]
    return np.array(ids, np.int32)


def _assistant_span(
    text: str, messages: list[dict[str, Any]], turn: int, template: ChatTemplate, where: str
) -> tuple[int, int]:
    """Returns the start and end of a message of the assistant in the text of a chat, with the token that ends the message.

    Args:
        text: the text of all messages.
        turn: the number of the message.
    """
    before, prompt = template.render(messages[:turn]), template.render(messages[:turn], prompt=True)
    up_to_here, said = template.render(messages[: turn + 1]), messages[turn]["content"].strip()
    start = len(prompt) if text.startswith(prompt) else _common_length(text, prompt)
    if text.startswith(before) and text.startswith(up_to_here):
        return start, len(up_to_here)
    # Some templates drop the reasoning of a message when other messages follow. Then only the content is searched for.
    found = text.find(said, start) if said and text.startswith(before) else -1
    if found < 0:
        raise DataError(
            f"{where}: the chat template renders message {turn} differently when other messages follow, so it is not known "
            "which tokens to predict"
        )
    end = found + len(said)
    mark = up_to_here[up_to_here.rindex(said) + len(said) :]
    return start, end + len(mark) if text.startswith(mark, end) else end


def _common_length(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Returns the length of the longest common prefix."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def _messages(document: Document, key: str | None) -> list[dict[str, Any]]:
    """Returns the messages of a chat in the form that chat templates expect."""
    fields = format_fields("chat", key)
    value = document.value
    if isinstance(value, dict):
        value = next((value[field] for field in fields if value.get(field)), None)
    if not isinstance(value, list) or not value:
        raise _missing_field(document, "messages", fields)
    return [_message(entry, document.where) for entry in value]


def _message(entry: Any, where: str) -> dict[str, Any]:
    """Returns {"role": ..., "content": ...} for a message in this form or in the form {"from": ..., "value": ...}."""
    if not isinstance(entry, dict):
        raise DataError(f"{where}: a message must be an object, and is a {type(entry).__name__}")
    role, content = entry.get("role", entry.get("from")), entry.get("content", entry.get("value"))
    if isinstance(content, list):  # a list of parts; only their text is used
        content = "".join(part.get("text", "") if isinstance(part, dict) else "" for part in content)
    if not isinstance(role, str) or not isinstance(content, str):
        raise DataError(f"{where}: a message must have a role and a content (or from and value), and has {', '.join(entry)}")
    more = {k: v for k, v in entry.items() if k not in ("role", "from", "content", "value") and v is not None}
    return {**more, "role": ROLES.get(role, role), "content": content}
