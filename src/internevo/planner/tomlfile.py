"""The TOML files of the planner: a key and a value a line."""

from __future__ import annotations

import difflib
import json
import reprlib
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def read(path: Path) -> dict[str, Any]:
    """Reads a file.

    Raises:
        ValueError: if it cannot be read. The message says why.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(error.strerror) from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def save(path: Path, values: Mapping[str, Any], comment: str) -> None:
    """Writes texts and numbers, after the lines of a comment."""
    lines = [f"# {line}" for line in comment.splitlines()]
    lines += [f"{key} = {json.dumps(value)}" for key, value in values.items()]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def unknown(key: str, known: Iterable[str]) -> str:
    """Returns the message for a key that a file must not have."""
    near = difflib.get_close_matches(key, list(known), 1)
    return f"unknown key {key}" + (f"; did you mean {near[0]}?" if near else "")


def wrong_number(key: str, value: Any, least: float, most: float, *, whole: bool = False) -> str:
    """Returns the message for a value that is no number, or none between two others; empty: it is one."""
    is_number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if is_number and least <= value <= most:
        return ""
    return f"{key} = {reprlib.repr(value)} must be a {'whole ' * whole}number from {least:g} to {most:g}"
