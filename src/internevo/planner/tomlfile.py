"""The TOML files of the planner: a key and a value a line."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def save(path: Path, values: Mapping[str, Any], comment: str) -> None:
    """Writes texts and numbers, after the lines of a comment."""
    lines = [f"# {line}" for line in comment.splitlines()]
    lines += [f"{key} = {json.dumps(value)}" for key, value in values.items()]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def unknown(key: str, known: Iterable[str]) -> str:
    """Returns the message for a key that a file must not have."""
    near = difflib.get_close_matches(key, list(known), 1)
    return f"unknown key {key}" + (f"; did you mean {near[0]}?" if near else "")
