"""The chat template of a tokenizer's folder, which makes one text of the messages of a chat.

Templates are written in Jinja (https://huggingface.co/docs/transformers/chat_templating). They run in Jinja's sandbox: they can
compute text, and have no access to anything else.
"""

from __future__ import annotations

import datetime
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
import jinja2.nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..errors import DataError, UsageError
from .special_tokens import read_optional
from .tokenizer import TEMPLATE, TEMPLATES, Tokenizer

Messages = list[dict[str, Any]]
REASONING = ("reasoning_content", "thinking", "reasoning")
"""The names of a message's reasoning. As in transformers, templates find it under the first two."""


def is_chat(value: object) -> bool:
    """Whether a value is a list of messages, each an object with a role."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(message, dict) and isinstance(message.get("role"), str) for message in value)
    )


@dataclass
class ChatTemplate:
    """A compiled chat template."""

    template: jinja2.Template
    tokens: dict[str, str]
    """The special tokens that the template may use: {"bos_token": "<s>", ...}."""
    path: Path
    """The tokenizer's folder, for error messages."""
    variables: frozenset[str]
    """The variables that the template reads: "messages", "tools", ..."""
    fields: frozenset[str]
    """The names of fields that the template reads: "role", "content", "tool_calls", ..."""

    @classmethod
    def load(cls, tokenizer: Tokenizer, name: str = "default", today: str | None = None) -> ChatTemplate:
        """Reads a tokenizer's template from ``chat_template.jinja``, or from ``chat_template`` in ``tokenizer_config.json``.

        Args:
            name: which template, if the folder has several: "tool_use" is for chats with tools. If there is no template of
                this name, the one that is called "default".
            today: the date (YYYY-MM-DD) that the template takes for today; None: the present time.

        Raises:
            UsageError: if the tokenizer has no template, or it cannot be compiled.
        """
        folder = tokenizer.folder
        known = templates(folder)
        text = known.get(name) or known.get("default")
        if not text:
            names = f" called default (it has {', '.join(sorted(known))})" if known else ""
            raise UsageError(
                f"{folder} has no chat template{names}, so it cannot be used for chats: add {TEMPLATE}, or chat_template in "
                "tokenizer_config.json"
            )
        # transformers adds a tag to Jinja that marks what the assistant says. It is removed, because data/encoding/formats.py
        # finds these parts by rendering prompts.
        text = re.sub(
            r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})", lambda m: f"{m[1]}{'endif' if m[2] else 'if true'}{m[3]}", text
        )
        environment = _environment(today)
        try:
            template, tree = environment.from_string(text), environment.parse(text)
        except jinja2.TemplateError as error:
            raise UsageError(f"the chat template of {folder} cannot be read: {error}") from error
        variables = frozenset(jinja2.meta.find_undeclared_variables(tree)) - set(environment.globals)
        return cls(template, tokenizer.special_tokens, folder, variables, _field_names(tree))

    def render(self, messages: Messages, values: dict[str, Any] | None = None, prompt: bool = False) -> str:
        """Returns the text of a chat.

        Args:
            messages: {"role": ..., "content": ...} of each message.
            values: other variables of the template: {"tools": [...], ...}.
            prompt: end the text with the beginning of an answer of the assistant (``add_generation_prompt``).

        Raises:
            DataError: if the template cannot render the messages.
        """
        values = {"tools": None, "documents": None, **self.tokens, **(values or {}), "add_generation_prompt": prompt}
        try:
            try:
                return self.template.render({**values, "messages": messages})
            except jinja2.UndefinedError:  # templates differ in whether they take a message without content, as with tool calls
                if all("content" in message for message in messages):
                    raise
                return self.template.render({**values, "messages": [{"content": "", **message} for message in messages]})
        except (jinja2.TemplateError, TypeError, KeyError, IndexError, AttributeError, ValueError, ArithmeticError) as error:
            raise DataError(f"the chat template of {self.path} cannot render {_short(messages)}: {error}") from error


def has_template(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer has a chat template."""
    return "default" in templates(tokenizer.folder)


def templates(folder: Path) -> dict[str, str]:
    """Returns the templates of a folder by their names; if there is only one, its name is "default".

    Raises:
        UsageError: if a file cannot be read.
    """
    files = {"default": folder / TEMPLATE, **{path.stem: path for path in folder.glob(TEMPLATES)}}
    try:
        found = {name: path.read_text(encoding="utf-8") for name, path in files.items() if path.is_file()}
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the chat templates of {folder} cannot be read: {error}") from error
    value = found or read_optional(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(value, list):
        value = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
    if isinstance(value, str):
        value = {"default": value}
    return {str(name): text for name, text in (value or {}).items() if isinstance(text, str) and text}


def _field_names(tree: jinja2.nodes.Template) -> frozenset[str]:
    """Returns the attributes and the texts in a template, among which are the names of the fields of messages that it reads."""
    names = {node.attr for node in tree.find_all(jinja2.nodes.Getattr)}
    return frozenset(names | {node.value for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str)})


def _environment(today: str | None) -> ImmutableSandboxedEnvironment:
    """Returns the Jinja environment that transformers uses for chat templates: the same options, filters and functions.

    Args:
        today: as in ``ChatTemplate.load``.
    """

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(
        value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    day = None if today is None else datetime.datetime.fromisoformat(today)
    environment.globals["strftime_now"] = lambda form: (day or datetime.datetime.now()).strftime(form)
    return environment


def _short(messages: Messages) -> str:
    text = json.dumps(messages, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
