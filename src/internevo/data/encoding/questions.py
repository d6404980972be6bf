"""Questions: the ids of a prompt up to where its answer begins, and what ends the answer."""

from __future__ import annotations

from functools import partial
from itertools import takewhile
from typing import Any, NamedTuple

from ...errors import DataError, UsageError
from ...text.chat import ChatTemplate, Messages
from ...text.tokenizer import Tokenizer
from ..raw.documents import Document
from .chats import MARK, marked
from .formats import END_OF_ANSWER, FormatName, alpaca_question, check_alpaca
from .messages import Chat

ANY_QUESTION: Messages = [{"role": "user", "content": "?"}]


class Question(NamedTuple):
    """What a model continues."""

    ids: list[int]
    """The ids up to where the answer begins."""
    stop_ids: set[int]
    """The ids that end the answer."""
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these texts."""


class Ending(NamedTuple):
    """What a chat template puts after an answer, which is what the model has learned to put there.

    An ordinary token does not end an answer, because an answer may have it: "<", if "<|im_end|>" is no token of the tokenizer.
    """

    id: int | None = None
    """The first token apart (``Tokenizer.apart``)."""
    text: str = ""
    """The text of the ordinary tokens before it."""

    @property
    def stop_ids(self) -> set[int]:
        """The ids that end an answer."""
        return set() if self.id is None else {self.id}

    @property
    def stop(self) -> tuple[str, ...]:
        """The texts that end an answer."""
        return (self.text,) if self.text else ()

    @classmethod
    def of(cls, template: ChatTemplate, messages: Messages, values: dict[str, Any], tokenizer: Tokenizer) -> Ending:
        """Returns what ends the answer to these messages. White space ends none.

        Raises:
            DataError: if the template cannot render the messages.
        """
        after = tokenizer.encode(template.render([*messages, marked()], values).partition(MARK)[2])
        apart = tokenizer.apart
        ordinary = list(takewhile(lambda id_: id_ not in apart or not tokenizer.decode([id_]).strip(), after))
        return cls(after[len(ordinary)] if len(ordinary) < len(after) else None, tokenizer.decode(ordinary).strip())

    @classmethod
    def usual(cls, tokenizer: Tokenizer) -> Ending:
        """Returns what ends the answer to a question of one message; nothing, if the template cannot render such a question.

        Raises:
            UsageError: if the tokenizer has no chat template.
        """
        template = ChatTemplate.load(tokenizer)
        try:
            return cls.of(template, ANY_QUESTION, {}, tokenizer)
        except DataError:
            return cls()

    def problem(self, tokenizer: Tokenizer) -> str:
        """Says why other programs will not know where the answers of a model end; empty if they will."""
        if self.id is not None:
            return ""
        ends = (
            f"ends an answer with {self.text!r}, which is no token of the tokenizer,"
            if self.text
            else "ends answers with nothing,"
        )
        token = tokenizer.special_tokens.get("eos_token")
        example = f" (as {token})" if token else ""
        return (
            f"the chat template of {tokenizer.folder} ends {ends} so other programs will not stop at the end of an answer; use "
            f"a template that ends answers with a special token{example}"
        )


def encode_prompt(name: FormatName, text: str, tokenizer: Tokenizer, values: dict[str, Any] | None = None) -> Question:
    """Encodes the text that a model continues, or the question that it answers.

    Args:
        values: fields next to the prompt. Those of a chat (``CHAT_VALUES``) are used in the format "chat"; all others are not.

    Raises:
        DataError: if the format has no place for a field of a question ("system", "history"), or as ``encode_messages``.
        UsageError: if the text has bytes that are not UTF-8, or as ``encode_messages``.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"the prompt is not UTF-8: character {error.start} is {text[error.start]!r}") from None
    stop_ids = set(tokenizer.eos)
    if name == "text":
        return Question(tokenizer.with_bos(text), stop_ids)
    if name == "alpaca":
        check_alpaca(values or {}, "the question")
        end = tokenizer.backend.token_id(END_OF_ANSWER)
        stop_ids |= set() if end is None else {end}
        return Question([*tokenizer.bos, *alpaca_question(text, tokenizer)], stop_ids, (END_OF_ANSWER,))
    return encode_messages([{"role": "user", "content": text}], tokenizer, values)


def encode_messages(messages: Messages, tokenizer: Tokenizer, values: dict[str, Any] | None = None) -> Question:
    """Encodes a chat, as chats to train on are, up to where the assistant's answer begins.

    Args:
        messages: {"role": ..., "content": ...} of each message, the last one the user's.
        values: fields next to the messages: {"tools": [...], ...}. Those that are not of a chat are not used.

    Raises:
        DataError: if the chat template cannot render the messages, or does not use all that they say.
        UsageError: if there is no chat template, or it makes no text of the messages.
    """
    document = Document({**(values or {}), "messages": messages}, "the chat")
    chat = Chat.read(document, None, partial(ChatTemplate.load, tokenizer))
    text = chat.render(chat.messages, prompt=True)
    ids = tokenizer.encode(text)
    if not ids:
        last = messages[-1].get("content") if messages else ""
        raise UsageError(f"the chat template of {chat.template.path} makes no text of the question {last!r}")
    chat.check_used(text, prompt=True)
    ending = Ending.of(chat.template, chat.messages, chat.values, tokenizer)
    return Question(ids, {*tokenizer.eos, *ending.stop_ids}, ending.stop)
