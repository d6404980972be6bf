"""What of a raw document is trained on: plain text, Alpaca instructions, or chats.

A format turns documents into ids with signs: a negative id is seen and not predicted (see ``tokenized``).

| format | a document has                                         | trained on                    |
|--------|--------------------------------------------------------|-------------------------------|
| text   | a text                                                 | all of it                     |
| alpaca | instruction, input, output                             | the output                    |
| chat   | messages (role, content) or conversations (from, value)| what the assistant says       |
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
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
END_OF_ANSWER = "<eoa>"
"""In the Alpaca template."""

Signed = npt.NDArray[np.int32]
Made = Signed | DataError
"""A document's ids with signs, or what is wrong with it."""


def fields_of(name: FormatName, key: str | None) -> tuple[str, ...]:
    """The fields that a format looks for; ``key`` names another one than the usual."""
    if name == "alpaca":
        return ALPACA_FIELDS
    return (key,) if key else (CHAT_FIELDS if name == "chat" else TEXT_FIELDS)


def make(name: FormatName, found: list[Document], key: str | None, tokenizer: Tokenizer) -> list[Made]:
    """Ids of documents, empty where there is nothing to train on."""
    makers: dict[FormatName, Callable[[list[Document], str | None, Tokenizer], list[Made]]] = {
        "text": _texts, "alpaca": _alpacas, "chat": _chats,
    }  # fmt: skip
    return makers[name](found, key, tokenizer)


def make_prompt(name: FormatName, text: str, tokenizer: Tokenizer) -> tuple[list[int], set[int]]:
    """The ids of a question up to where the answer begins, and ids that end the answer; of a text, its own."""
    ends = set() if tokenizer.eos_id is None else {tokenizer.eos_id}
    if name == "text":
        return tokenizer.with_bos(text), ends
    if name == "alpaca":
        mark = tokenizer.backend.token_id(END_OF_ANSWER)
        return [*_ends(tokenizer)[0], *_asked(text, tokenizer)], ends | (set() if mark is None else {mark})
    template = ChatTemplate.load(tokenizer)
    asked = [{"role": "user", "content": text}]
    alone = template.render([*asked, {"role": "assistant", "content": "x"}])
    behind = tokenizer.encode(alone[alone.rindex("x") + 1 :])
    mark = next((number for number in behind if tokenizer.decode([number]).strip()), None)
    return tokenizer.encode(template.render(asked, prompt=True)), ends | (set() if mark is None else {mark})


def _masked(ids: list[int]) -> list[int]:
    return [-number if number else MASKED_ZERO for number in ids]


def _ends(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    bos, eos = tokenizer.bos_id, tokenizer.eos_id
    return [] if bos is None else [bos], [] if eos is None else [eos]


def _texts(found: list[Document], key: str | None, tokenizer: Tokenizer) -> list[Made]:
    """Begin, text, end."""
    texts = [text_of(document, key) for document in found]
    encoded = iter(tokenizer.backend.encode_batch([text for text in texts if isinstance(text, str)]))
    bos, eos = _ends(tokenizer)
    made: list[Made] = []
    for text in texts:
        if isinstance(text, str):
            ids = next(encoded)
            made.append(np.array([*bos, *ids, *eos] if ids else [], np.int32))
        else:
            made.append(text)
    return made


def text_of(document: Document, key: str | None) -> str | DataError:
    """The text of a document, as such or under ``key`` (by default one of ``TEXT_FIELDS``)."""
    value = document.value
    if isinstance(value, str) and key is None:
        return value
    fields = fields_of("text", key)
    if isinstance(value, dict):
        for field in fields:
            if isinstance(value.get(field), str):
                return str(value[field])
    return _lacks(document, "text", fields)


def _lacks(document: Document, what: str, fields: tuple[str, ...]) -> DataError:
    value = document.value
    has = type(value).__name__
    if isinstance(value, dict):
        has = ", ".join(f"{k!r} ({type(v).__name__})" if k in fields else repr(k) for k, v in value.items())
    return DataError(
        f"{document.where} has no {what} under {' or '.join(map(repr, fields))} (it has {has}); give --text-key "
        "(data.content_name in a config)"
    )


# Alpaca --------------------------------------------------------------------------------------------------------------


def _alpacas(found: list[Document], key: str | None, tokenizer: Tokenizer) -> list[Made]:
    """InternEvo's template: ``<|User|>:`` instruction and input ``<eoh>``, ``<|Bot|>:`` output ``<eoa>``; the output is
    predicted. A tokenizer without these two tokens sees them as text."""
    return [_alpaca(document, tokenizer) for document in found]


def _alpaca(document: Document, tokenizer: Tokenizer) -> Made:
    value = document.value if isinstance(document.value, dict) else {}
    instruction, given, output = (value.get(field, "") for field in ALPACA_FIELDS)
    if not (isinstance(instruction, str) and isinstance(output, str) and instruction and output):
        return _lacks(document, "instruction and output", ALPACA_FIELDS)
    bos, eos = _ends(tokenizer)
    asked = _asked(f"{instruction}\n{given}" if given else instruction, tokenizer)
    answer = [*tokenizer.encode(output), *_token(END_OF_ANSWER, tokenizer), *_newline(tokenizer)]
    return np.array([*bos, *_masked(asked), *answer, *eos], np.int32)


def _asked(question: str, tokenizer: Tokenizer) -> list[int]:
    end = [*_token("<eoh>", tokenizer), *_newline(tokenizer)]
    return [*tokenizer.encode(f"<|User|>:{question}"), *end, *tokenizer.encode("<|Bot|>:")]


def _newline(tokenizer: Tokenizer) -> list[int]:
    return tokenizer.encode("\n")[-1:]  # SentencePiece puts a blank in front


def _token(name: str, tokenizer: Tokenizer) -> list[int]:
    found = tokenizer.backend.token_id(name)
    return tokenizer.encode(name) if found is None else [found]


# Chats ---------------------------------------------------------------------------------------------------------------


def _chats(found: list[Document], key: str | None, tokenizer: Tokenizer) -> list[Made]:
    """The tokenizer's chat template; what rendering an assistant's message adds behind its prompt is predicted."""
    template = ChatTemplate.load(tokenizer)
    return [_chat(document, key, tokenizer, template) for document in found]


def _chat(document: Document, key: str | None, tokenizer: Tokenizer, template: ChatTemplate) -> Made:
    try:
        messages = _messages(document, key)
        turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if not turns:
            raise DataError(f"{document.where} has no message of the assistant")
        text = template.render(messages)
        spans = [_span(text, messages, turn, template, document.where) for turn in turns]
    except DataError as error:
        return error
    whole, *cuts = tokenizer.backend.encode_batch([text, *(text[:end] for span in spans for end in span)])
    ids = _masked(whole)
    for before, behind in zip(cuts[::2], cuts[1::2], strict=True):
        start, stop = _common(whole, before), _common(whole, behind)
        ids[start:stop] = whole[start:stop]
    return np.array(ids, np.int32)


def _span(text: str, messages: list[dict[str, Any]], turn: int, template: ChatTemplate, where: str) -> tuple[int, int]:
    """What of the text of all messages the assistant says in its ``turn``, the end mark included."""
    before, prompt = template.render(messages[:turn]), template.render(messages[:turn], prompt=True)
    alone, said = template.render(messages[: turn + 1]), messages[turn]["content"].strip()
    start = len(prompt) if text.startswith(prompt) else _common(text, prompt)
    if text.startswith(before) and text.startswith(alone):
        return start, len(alone)
    # Some templates leave out what was thought when others follow: then it is what was said that is looked for.
    found = text.find(said, start) if said and text.startswith(before) else -1
    if found < 0:
        raise DataError(f"{where}: the chat template renders message {turn} otherwise when others follow")
    end = found + len(said)
    mark = alone[alone.rindex(said) + len(said) :]
    return start, end + len(mark) if text.startswith(mark, end) else end


def _common(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How much at the beginning is the same."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))


def _messages(document: Document, key: str | None) -> list[dict[str, Any]]:
    fields = fields_of("chat", key)
    value = document.value
    if isinstance(value, dict):
        value = next((value[field] for field in fields if value.get(field)), None)
    if not isinstance(value, list) or not value:
        raise _lacks(document, "messages", fields)
    return [_message(entry, document.where) for entry in value]


def _message(entry: Any, where: str) -> dict[str, Any]:
    """{"role": ..., "content": ...}, from that or from {"from": ..., "value": ...}."""
    if not isinstance(entry, dict):
        raise DataError(f"{where}: a message is {type(entry).__name__}, not an object")
    role, content = entry.get("role", entry.get("from")), entry.get("content", entry.get("value"))
    if isinstance(content, list):  # parts, of which those of text are known
        content = "".join(part.get("text", "") if isinstance(part, dict) else "" for part in content)
    if not isinstance(role, str) or not isinstance(content, str):
        raise DataError(f"{where}: a message needs a role and a content (or from and value), and has {', '.join(entry)}")
    more = {k: v for k, v in entry.items() if k not in ("role", "from", "content", "value") and v is not None}
    return {**more, "role": ROLES.get(role, role), "content": content}
