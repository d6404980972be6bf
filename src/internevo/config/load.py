"""Reads a config file, applies overrides, and returns one validated ``Config``.

The file overrides the defaults, and the command line overrides the file. All mistakes are reported together, each with its key
and, for an unknown key, the name that was probably meant.
"""

from __future__ import annotations

import ast
import copy
import json
import os
import warnings
from functools import reduce
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..errors import ConfigError, expect, expect_texts
from ..wording import counted
from .files import read_file
from .internevo import translate
from .messages import describe, section_at
from .option import field_kinds, holds_texts, walk
from .schema import Config


def read_values(path: str | Path | dict[str, Any], overrides: list[str] | tuple[str, ...] = ()) -> dict[str, Any]:
    """Reads a config file (.py, .yaml, .yml, .toml or .json), and applies ``key.path=value`` overrides.

    Args:
        path: the file; or what would be in it, as nested dicts.

    Returns:
        The values by the schema's names, which are not validated yet.

    Raises:
        ConfigError: if the file cannot be read, an override is not one, or an older key contradicts a newer one.
    """
    expect(path, (str, Path, dict), "a config is given by the path of a config file, or as a dict of its values")
    expect_texts(overrides, "overrides")
    raw = copy.deepcopy(path) if isinstance(path, dict) else read_file(Path(path))
    for text in overrides:
        apply_override(raw, text)
    return translate(raw)


def validate(raw: dict[str, Any], source: str = "config") -> Config:
    """Turns a dict with InternEvo's names into a ``Config``.

    Args:
        source: the name of the config in error messages.

    Raises:
        ConfigError: if the config has mistakes; one line for each.
    """
    try:
        return Config.model_validate(translate(raw))
    except ValidationError as error:
        lines = describe(error.errors())
        raise ConfigError(f"{source}: {counted(len(lines), 'problem')}\n" + "\n".join(f"  {line}" for line in lines)) from None


# Overrides -----------------------------------------------------------------------------------------------------------


def apply_override(raw: dict[str, Any], text: str) -> None:
    """Applies one override ``a.b.c=value`` to ``raw``.

    The value is read by the type of its key: as it stands if the key's values are texts or lists of texts (unless it is such a
    list), otherwise as ``parse_value`` does.
    """
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"override {text!r} does not have the form key.path=value (without spaces)")
    *parents, last = key.split(".")
    node = raw
    for position, name in enumerate(parents):
        child = node.get(name)
        if child is None:
            child = node[name] = {}
        elif isinstance(child, int) and not isinstance(child, bool):
            child = node[name] = {"size": child}  # parallel.tensor = 4 is short for dict(size=4)
        if not isinstance(child, dict):
            raise ConfigError(f"override {text!r}: {'.'.join(parents[: position + 1])} is {child!r}, not a section with keys")
        node = child
    section = section_at(parents)
    field = section.model_fields.get(last) if section else None
    kinds = field_kinds(field) if field else set()
    parsed = parse_value(value)
    is_text = str in kinds and not kinds & {int, float, bool, Any}
    is_one = field is not None and holds_texts(field) and isinstance(parsed, bool | int | float)
    node[last] = value if is_one or (is_text and not isinstance(parsed, tuple(kinds))) else parsed


def parse_value(text: str) -> Any:
    """Converts the text of an override: ``true``, ``false``, ``none``, ``null``, a Python literal (also with ``dict(...)``, as
    config files have them), or otherwise a string."""
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        with warnings.catch_warnings(action="ignore"):  # of a text that resembles Python
            return ast.literal_eval(_DictCalls().visit(ast.parse(text.strip(), mode="eval")))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


class _DictCalls(ast.NodeTransformer):
    """Writes ``dict(a=1)`` as ``{"a": 1}``."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        names = [keyword.arg for keyword in node.keywords]
        is_dict = isinstance(node.func, ast.Name) and node.func.id == "dict"
        if not is_dict or node.args or None in names or len(set(names)) < len(names):
            return node
        return ast.Dict([ast.Constant(name) for name in names], [keyword.value for keyword in node.keywords])


def flat(config: Config) -> dict[str, Any]:
    """Returns key.path -> value, as in JSON, of every option."""
    values, found = json.loads(dump(config)), dict[str, Any]()
    for key, *_ in walk(config):
        found[key] = reduce(lambda section, name: section[name], key.split("."), values)
    return found


def dump(config: Config) -> str:
    """Returns the resolved config as JSON, with all defaults."""
    return config.model_dump_json(indent=2, fallback=repr) + os.linesep
