"""Writes a config file: the keys that were set, with their values."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from pprint import pformat
from typing import Any

from ..errors import UsageError
from .schema import Config

MARK = "Written by internevo plan"
"""The beginning of every file."""


def write_config(config: Config, path: Path, comment: str) -> None:
    """Writes a config as Python, YAML, TOML or JSON, as the name of the file says.

    Args:
        comment: what the file says about itself, in one line.

    Raises:
        UsageError: if the file has another kind, or exists and was not written by this function.
    """
    check_writable(path)
    values = config.model_dump(mode="json", exclude_unset=True)
    text = {".json": _json, ".toml": _toml}.get(path.suffix, _python if path.suffix == ".py" else _yaml)(values)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text if path.suffix == ".json" else f"# {MARK}. {comment}\n\n{text}", encoding="utf-8")


def check_writable(path: Path) -> None:
    """Checks that a config can be written to a file.

    Raises:
        UsageError: if not; see ``write_config``.
    """
    if path.suffix not in (".py", ".yaml", ".yml", ".toml", ".json"):
        raise UsageError(f"{path}: unknown file type {path.suffix!r}; use .py, .yaml, .toml or .json")
    if path.suffix == ".json" and path.is_file():
        raise UsageError(
            f"{path} exists, and a JSON file has no comment to say that internevo plan has written it, so it is not replaced: "
            "rename it, choose another name, or write .yaml, .toml or .py, which the next plan replaces"
        )
    check_own(path, f"# {MARK}", "a config that internevo plan has written")


def check_own(path: Path, beginning: str, what: str, chosen: bool = True) -> None:
    """Checks that a file does not exist, or begins with what a command of this program writes.

    Args:
        what: what this program writes to it, for the message.
        chosen: whether the user has chosen the name, and may choose another.

    Raises:
        UsageError: if it is something else, or cannot be written.
    """
    other = "choose another name" if chosen else ""
    if os.path.lexists(path) and not (path.is_file() and os.access(path, os.R_OK) and _begins(path, beginning)):
        raise UsageError(f"{path} exists and is not {what}, so it is not replaced: rename it{other and f', or {other}'}")
    if reason := obstacle(path.parent) or (path.exists() and not os.access(path, os.W_OK) and f"{path} cannot be written to"):
        raise UsageError(f"{path} cannot be written, because {reason}{other and f': {other}'}")


def _begins(path: Path, beginning: str) -> bool:
    with path.open("rb") as file:
        return file.read(len(beginning.encode())) == beginning.encode()


def obstacle(folder: Path) -> str:
    """Returns why nothing can be written to a folder, which may still have to be made; empty: something can."""
    nearest = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(parent))
    if not nearest.is_dir():
        return f"{nearest} is not a folder"
    return "" if os.access(nearest, os.W_OK | os.X_OK) else f"{nearest} cannot be written to"


@dataclass(frozen=True)
class Code:
    """A value that is written as Python code."""

    text: str
    value: Any
    """What the code stands for."""


def readable(values: dict[str, Any], comments: dict[str, str], beginning: str, imports: str = "") -> str:
    """Returns a config as Python for people: one key on a line, with comments.

    Args:
        values: the keys that are set; a section is a dict.
        comments: "section.key" -> what is to be said about it.
        beginning: lines for the beginning of the file.
        imports: Python code that comes first.
    """
    lines = [f"# {line}".rstrip() for line in beginning.splitlines()] + ["", *([imports, ""] if imports else [])]
    for name, value in values.items():
        if not isinstance(value, dict):
            lines.append(f"{name} = {_literal(value)}{_comment(comments.get(name))}")
            continue
        inside = (f"    {key}={_literal(item)},{_comment(comments.get(f'{name}.{key}'))}" for key, item in value.items())
        lines += [f"{name} = dict({_comment(comments.get(name))}", *inside, ")"]
    return "\n".join(lines) + "\n"


def _literal(value: Any) -> str:
    if isinstance(value, dict):
        return f"dict({', '.join(f'{key}={_literal(item)}' for key, item in value.items())})"
    if isinstance(value, Code):
        return value.text
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def _comment(text: str | None) -> str:
    return f"  # {text}" if text else ""


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2) + "\n"


def _python(values: dict[str, Any]) -> str:
    return "\n".join(f"{name} = {pformat(value, sort_dicts=False, width=100)}" for name, value in values.items()) + "\n"


def _yaml(values: dict[str, Any]) -> str:
    import yaml

    return str(yaml.safe_dump(values, sort_keys=False))


def _toml(values: dict[str, Any]) -> str:
    """Sections are tables; what is in them is inline. TOML has no None; it is the default of all keys that may be None."""
    single = {name: value for name, value in values.items() if not isinstance(value, dict) and value is not None}
    lines = [f"{name} = {_inline(value)}" for name, value in single.items()]
    for name, section in values.items():
        if isinstance(section, dict):
            inside = (f"{_key(key)} = {_inline(value)}" for key, value in section.items() if value is not None)
            lines += ["", f"[{name}]", *inside]
    return "\n".join(lines) + "\n"


def _key(name: str) -> str:
    """A key of TOML needs quotes only if it has other characters than these, as parts of paths have (data.min_length_dict)."""
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else json.dumps(name)


def _inline(value: Any) -> str:
    if isinstance(value, dict):
        inside = (f"{_key(key)} = {_inline(item)}" for key, item in value.items() if item is not None)
        return "{" + ", ".join(inside) + "}"
    return f"[{', '.join(map(_inline, value))}]" if isinstance(value, list) else json.dumps(value)
