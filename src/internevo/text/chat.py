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
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ..errors import DataError, UsageError
from ..storage.jsonfile import read_object
from .special_tokens import token_text
from .tokenizer import Tokenizer


@dataclass
class ChatTemplate:
    """A compiled chat template."""

    template: jinja2.Template
    tokens: dict[str, str]
    """The special tokens that the template may use: {"bos_token": "<s>", ...}."""
    path: Path
    """The tokenizer's folder, for error messages."""

    @classmethod
    def load(cls, tokenizer: Tokenizer) -> ChatTemplate:
        """Reads a tokenizer's template from ``chat_template.jinja``, or from ``chat_template`` in ``tokenizer_config.json``.

        Raises:
            UsageError: if the tokenizer has no template, or it cannot be compiled.
        """
        folder = tokenizer.path if tokenizer.path.is_dir() else tokenizer.path.parent
        settings = folder / "tokenizer_config.json"
        table = read_object(settings) if settings.is_file() else {}
        path = folder / "chat_template.jinja"
        text = path.read_text(encoding="utf-8") if path.is_file() else _default(table.get("chat_template"))
        if not text:
            raise UsageError(
                f"{folder} has no chat template, so it cannot be used for chats: add chat_template.jinja, or chat_template in "
                "tokenizer_config.json"
            )
        tokens = {key: token_text(value) for key, value in table.items() if key.endswith("_token")}
        # transformers adds a tag to Jinja that marks what the assistant says. It is removed, because data/encoding/formats.py
        # finds these parts by rendering prompts.
        text = re.sub(
            r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})", lambda m: f"{m[1]}{'endif' if m[2] else 'if true'}{m[3]}", text
        )
        try:
            template = _environment().from_string(text)
        except jinja2.TemplateError as error:
            raise UsageError(f"the chat template of {folder} cannot be read: {error}") from error
        return cls(template, {key: value for key, value in tokens.items() if value}, folder)

    def render(self, messages: list[dict[str, Any]], prompt: bool = False) -> str:
        """Returns the text of a chat.

        Args:
            messages: {"role": ..., "content": ...} of each message.
            prompt: end the text with the beginning of an answer of the assistant (``add_generation_prompt``).

        Raises:
            DataError: if the template cannot render the messages.
        """
        try:
            return self.template.render(messages=messages, add_generation_prompt=prompt, **self.tokens)
        except (jinja2.TemplateError, TypeError, KeyError, ValueError) as error:
            raise DataError(f"the chat template of {self.path} cannot render {_short(messages)}: {error}") from error


def _default(value: Any) -> str | None:
    """Returns the template from the value of ``chat_template``: a text, or a list of templates, one of them named "default"."""
    if isinstance(value, list):
        value = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}.get("default")
    return value if isinstance(value, str) else None


def _environment() -> ImmutableSandboxedEnvironment:
    """Returns the Jinja environment that transformers uses for chat templates: the same options, filters and functions."""

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, indent: int | None = None, **_: Any) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def _short(messages: list[dict[str, Any]]) -> str:
    text = json.dumps(messages, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
