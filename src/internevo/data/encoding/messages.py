"""Reads chats: the messages, and the fields next to them, in the form that chat templates expect.

A chat is {"messages": [{"role": ..., "content": ...}, ...]} or {"conversations": [{"from": ..., "value": ...}, ...]}. It may
also have the fields of ``CHAT_VALUES``, and its messages those that the template reads ("tool_calls", ...). An instruction
({"instruction": ..., "input": ..., "output": ...}) is a chat of two messages.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...errors import DataError
from ...text.chat import REASONING, ChatTemplate, Messages
from ..raw.documents import Document
from .shared import CHAT_FIELDS, INSTRUCTION_FIELDS, missing_field

CHAT_VALUES = ("system", "tools", "functions", "history", "documents", "enable_thinking", "chat_template_kwargs")
"""Fields next to the messages. They are variables of the chat template; ``system`` may also be its first message."""
ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant", "system": "system",
    "observation": "tool", "tool": "tool", "developer": "developer",
}  # fmt: skip
"""Names of roles in chats, and the name that chat templates have for each."""


@dataclass
class Chat:
    """A chat, with the template that makes a text of it."""

    messages: Messages
    weights: list[int]
    """For each message, 0 if it is not to be predicted, else 1."""
    values: dict[str, Any]
    """The fields next to the messages."""
    template: ChatTemplate
    where: str
    """Where the chat is, for error messages."""

    @classmethod
    def read(cls, document: Document, key: str | None, template_called: Callable[[str], ChatTemplate]) -> Chat:
        """Reads a chat.

        Args:
            key: the field that has the messages; None: the usual fields.
            template_called: returns the template of a name: "default", or "tool_use" for chats with tools.

        Raises:
            DataError: if the document is no chat, or a field has another kind than it should have.
        """
        document = _as_chat(document, key)
        values = _values(document)
        template = template_called("tool_use" if "tools" in values else "default")
        messages = _messages(document, key)
        weights = [_weight(message, number, document.where) for number, message in enumerate(messages)]
        messages = _with_system(messages, values, template, document.where)
        return cls(messages, [0] * (len(messages) - len(weights)) + weights, values, template, document.where)

    def render(self, messages: Messages, prompt: bool = False) -> str:
        """Returns the text of messages, in place of those of the chat; for the other arguments see ``ChatTemplate.render``."""
        return self.template.render(messages, self.values, prompt)

    def check_used(self, text: str, prompt: bool = False) -> None:
        """Checks that the template uses all that the chat says.

        Args:
            text: what ``render`` makes of the chat's messages.

        Raises:
            DataError: if the text is the same without a message, a field of a message or a field of the chat.
        """
        for name in self.values:
            if name not in self.template.variables:
                raise self._unused(f"the field {name!r}")
        for number, message in enumerate(self.messages):
            before, after = self.messages[:number], self.messages[number + 1 :]
            content = message.get("content", "").strip()
            if message["role"] != "assistant" and content and content not in text and self._is(text, [*before, *after], prompt):
                raise self._unused(f"message {number} (of the role {message['role']!r})")
            for names in (("tool_calls",), ("function_call",), REASONING):
                present = [name for name in names if message.get(name)]
                if present and not self.template.fields & set(names):
                    less = {key: value for key, value in message.items() if key not in names}
                    if self._is(text, [*before, less, *after], prompt):
                        raise self._unused(f"the field {present[0]!r} of message {number}")

    def _is(self, text: str, messages: Messages, prompt: bool) -> bool:
        """Whether the template makes this text of the messages."""
        try:
            return self.render(messages, prompt) == text
        except DataError:
            return False

    def _unused(self, what: str) -> DataError:
        return DataError(f"{self.where}: the chat template of {self.template.path} does not use {what}")


def question_of(instruction: str, input_: str) -> str:
    """Returns the question that an instruction and its input, which may be empty, are."""
    return f"{instruction}\n{input_}" if input_ else instruction


def _as_chat(document: Document, key: str | None) -> Document:
    """Returns an instruction as a chat; its history, a list of questions with their answers, comes first. Other documents are
    returned as they are."""
    value = document.value
    if key is not None or not isinstance(value, dict) or any(value.get(field) for field in CHAT_FIELDS):
        return document
    instruction, input_, output = (value.get(field) or "" for field in INSTRUCTION_FIELDS)
    if not instruction or not all(isinstance(text, str) for text in (instruction, input_, output)):
        return document  # ``_messages`` says what is missing
    if not output:
        raise DataError(f"{document.where} has an instruction, and no output, so there is nothing to predict")
    history = value.get("history") or []
    if not isinstance(history, list) or not all(isinstance(turn, list | tuple) and len(turn) == 2 for turn in history):
        raise DataError(f"{document.where}: 'history' must be a list of [question, answer]")
    turns = [*history, (question_of(instruction, input_), output)]
    messages = [
        {"role": role, "content": text} for turn in turns for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    rest = {name: item for name, item in value.items() if name not in (*INSTRUCTION_FIELDS, "history")}
    return Document({**rest, CHAT_FIELDS[0]: messages}, document.where)


def _values(document: Document) -> dict[str, Any]:
    """Returns the fields of a chat next to its messages that have a meaning for the template. Lists may be given as JSON."""
    found: dict[str, Any] = {}
    for field in CHAT_VALUES:
        value: Any = document.value.get(field) if isinstance(document.value, dict) else None
        if isinstance(value, str) and field != "system" and value.strip():
            try:
                value = json.loads(value)
            except ValueError as error:
                raise DataError(f"{document.where}: {field!r} is not JSON: {error}") from error
        if value in (None, "", [], {}):
            continue
        wanted: type[Any] = {"system": str, "enable_thinking": bool, "chat_template_kwargs": dict}.get(field, list)
        if not isinstance(value, wanted):
            raise DataError(f"{document.where}: {field!r} must be a {wanted.__name__}, and is a {type(value).__name__}")
        found |= value if field == "chat_template_kwargs" else {field: value}
    return found


def _weight(message: dict[str, Any], number: int, where: str) -> int:
    """Removes the weight of a message, and returns it: 0 if it is not to be predicted, else 1."""
    weight = message.pop("weight", None)
    if weight is not None and weight not in (0, 1):
        raise DataError(f"{where}: message {number} has weight {weight!r}; a weight must be 0 or 1")
    if weight and message["role"] != "assistant":
        raise DataError(f"{where}: message {number} has weight 1, but only messages of the assistant are predicted")
    return 0 if weight == 0 and weight is not None else 1


def _with_system(messages: Messages, values: dict[str, Any], template: ChatTemplate, where: str) -> Messages:
    """Returns the messages, the first of which is ``values["system"]`` if the template has no variable for it."""
    if "system" not in values or "system" in template.variables:
        return messages
    system = {"role": "system", "content": values.pop("system")}
    if messages[0]["role"] != "system":
        return [system, *messages]
    if messages[0] != system:
        raise DataError(f"{where}: the field 'system' and the first message, which is a system message too, differ")
    return messages


def _messages(document: Document, key: str | None) -> Messages:
    """Returns the messages of a chat in the form that chat templates expect."""
    fields = (key,) if key else CHAT_FIELDS
    value = document.value
    if isinstance(value, dict):
        value = next((value[field] for field in fields if value.get(field)), None)
    if not isinstance(value, list) or not value:
        raise missing_field(document, "messages", fields)
    return [_message(entry, f"{document.where}: message {number}") for number, entry in enumerate(value)]


def _message(entry: Any, where: str) -> dict[str, Any]:
    """Returns {"role": ..., "content": ...} for a message in this form or in the form {"from": ..., "value": ...}.

    As in transformers, fields that are null are left out, so a message that only calls tools has no content.
    """
    if not isinstance(entry, dict):
        raise DataError(f"{where} must be an object, and is a {type(entry).__name__}")
    role, content = entry.get("role", entry.get("from")), entry.get("content", entry.get("value"))
    if isinstance(content, list):
        content = "".join(_part_text(part, where) for part in content)
    calls = content is None and (entry.get("tool_calls") or entry.get("function_call"))
    if not isinstance(role, str) or not (isinstance(content, str) or calls):
        raise DataError(
            f"{where}: a message must have a role and a content (or from and value, or tool_calls), and this one has "
            f"{', '.join(f'{k} ({type(v).__name__})' for k, v in entry.items()) or 'nothing'}"
        )
    if "role" not in entry and role not in ROLES:
        raise DataError(f"{where} is from {role!r}; known are {', '.join(ROLES)}")
    message = {k: v for k, v in entry.items() if k not in ("role", "from", "content", "value") and v is not None}
    reasoning = next((message[name] for name in REASONING if name in message), None)
    if reasoning is not None:
        message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
    return {"role": ROLES.get(role, role), **({} if content is None else {"content": content}), **message}


def _part_text(part: Any, where: str) -> str:
    """Returns the text of one of the parts that a content is a list of: a text, or {"type": "text", "text": ...}."""
    text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else part
    if not isinstance(text, str):
        kind = repr(part.get("type")) if isinstance(part, dict) else type(part).__name__
        raise DataError(f"{where} has a part that is not text ({kind}); only text can be used")
    return text
