"""Reads the special tokens in a tokenizer's settings."""

from __future__ import annotations

from typing import Any


def token_text(token: Any) -> str | None:
    """Returns the text of a token, which is given as text or as an object with the field "content"; None if it is neither."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) and content else None
