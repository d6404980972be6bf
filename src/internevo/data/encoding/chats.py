"""Encodes chats: the chat template makes one text of the messages, and what the assistant says in it is predicted."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...errors import DataError
from ...text.beginnings import common_length, encode_with_beginnings
from ...text.chat import ChatTemplate
from ...text.tokenizer import Tokenizer
from ..raw.documents import Document
from .messages import Chat
from .shared import IdsOrError, mask

MARK = "\ufdd0answer\ufdd1"
"""Stands for an answer, to find where a template puts it. Its first and last characters are none of Unicode's."""


def encode_chats(documents: list[Document], key: str | None, tokenizer: Tokenizer, today: str) -> list[IdsOrError]:
    """Encodes chats with the tokenizer's chat template, which takes ``today`` (YYYY-MM-DD) for the date.

    What the template adds for a message of the assistant after its prompt is predicted: the message and the token that ends it.
    Messages with ``weight`` 0 are not predicted.
    """
    templates = {name: ChatTemplate.load(tokenizer, name, today) for name in ("default", "tool_use")}
    return [_encode_chat(document, key, tokenizer, templates) for document in documents]


def _encode_chat(document: Document, key: str | None, tokenizer: Tokenizer, templates: dict[str, ChatTemplate]) -> IdsOrError:
    try:
        chat = Chat.read(document, key, templates.__getitem__)
        turns = [n for n, message in enumerate(chat.messages) if message["role"] == "assistant" and chat.weights[n]]
        if not turns:
            raise DataError(f"{document.where} has no message of the assistant (of weight 1), so there is nothing to predict")
        text = chat.render(chat.messages)
        chat.check_used(text)
        spans = [_assistant_span(text, chat, turn) for turn in turns]
    except DataError as error:  # the template does not know where the chat is
        return error if document.where in str(error) else DataError(f"{document.where}: {error}")
    whole, counts = encode_with_beginnings(tokenizer, text, (end for span in spans for end in span))
    ids = mask(whole)
    for start, stop in zip(counts[::2], counts[1::2], strict=True):
        ids[start:stop] = whole[start:stop]
    return np.array(ids, np.int32)


def _assistant_span(text: str, chat: Chat, turn: int) -> tuple[int, int]:
    """Returns the start and end of a message of the assistant in the text of a chat, with the token that ends the message.

    Args:
        turn: the number of the message.
    """
    messages, start = chat.messages, None
    try:
        before, up_to_here = chat.render(messages[:turn]), chat.render(messages[: turn + 1])
        prompt = chat.render(messages[:turn], prompt=True)
    except DataError:
        pass  # some templates refuse the beginning of a chat, for example one without a question
    else:
        if text.startswith(before):
            start = len(prompt) if text.startswith(prompt) else common_length(text, prompt)
            if text.startswith(up_to_here):
                return start, len(up_to_here)
    begin, end = _span_of_what_remains(text, chat, turn)
    return begin if start is None else min(start, begin), end


def _span_of_what_remains(text: str, chat: Chat, turn: int) -> tuple[int, int]:
    """Returns the start and end of a message in a template that drops parts of it (the reasoning) when other messages follow.

    The message is what stands where the template puts another message in its place.
    """
    before, after = chat.messages[:turn], chat.messages[turn + 1 :]
    head, mark, tail = chat.render([*before, marked(), *after]).partition(MARK)
    if not (mark and text.startswith(head) and text.endswith(tail) and len(head) + len(tail) <= len(text)):
        raise DataError(
            f"{chat.where}: the chat template renders message {turn} differently when other messages follow, so it is not "
            "known which tokens to predict"
        )
    ending = chat.render([*before, marked()]).partition(MARK)[2]
    return len(head), len(text) - len(tail) + common_length(tail, ending)


def marked() -> dict[str, Any]:
    """Returns a message of the assistant that says ``MARK``."""
    return {"role": "assistant", "content": MARK}
