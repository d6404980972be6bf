"""Special tokens as a tokenizer's settings name them."""

from __future__ import annotations

from typing import Any


def token_text(token: Any) -> str | None:
    """A token is written as its text, or as an object with it."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) and content else None
