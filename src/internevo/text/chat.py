"""The chat template of a tokenizer's folder: how messages become one text.

Templates are Jinja (https://huggingface.co/docs/transformers/chat_templating), run in its sandbox: they can compute text and
reach nothing else.
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
    """A compiled template, with the special tokens that it may name."""

    template: jinja2.Template
    tokens: dict[str, str]
    path: Path

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> ChatTemplate:
        """The template that lies with a tokenizer: ``chat_template.jinja``, or in ``tokenizer_config.json``.

        Raises:
            UsageError: when there is none, or it cannot be read.
        """
        folder = tokenizer.path if tokenizer.path.is_dir() else tokenizer.path.parent
        settings = folder / "tokenizer_config.json"
        table = read_object(settings) if settings.is_file() else {}
        path = folder / "chat_template.jinja"
        text = path.read_text(encoding="utf-8") if path.is_file() else _default(table.get("chat_template"))
        if not text:
            raise UsageError(
                f"{folder} has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json): chats cannot "
                "be tokenized with it"
            )
        tokens = {key: token_text(value) for key, value in table.items() if key.endswith("_token")}
        # Marks of what the assistant says, which transformers added to Jinja, are found by rendering prompts here.
        text = re.sub(
            r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})", lambda m: f"{m[1]}{'endif' if m[2] else 'if true'}{m[3]}", text
        )
        try:
            template = _environment().from_string(text)
        except jinja2.TemplateError as error:
            raise UsageError(f"the chat template of {folder} cannot be read: {error}") from error
        return cls(template, {key: value for key, value in tokens.items() if value}, folder)

    def render(self, messages: list[dict[str, Any]], prompt: bool = False) -> str:
        """The text of messages; with ``prompt``, up to where the assistant begins to speak.

        Raises:
            DataError: when the template refuses them.
        """
        try:
            return self.template.render(messages=messages, add_generation_prompt=prompt, **self.tokens)
        except (jinja2.TemplateError, TypeError, KeyError, ValueError) as error:
            raise DataError(f"the chat template of {self.path} cannot render {_short(messages)}: {error}") from error


def _default(value: Any) -> str | None:
    """One template, or several with names."""
    if isinstance(value, list):
        value = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}.get("default")
    return value if isinstance(value, str) else None


def _environment() -> ImmutableSandboxedEnvironment:
    """As transformers has it."""

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
