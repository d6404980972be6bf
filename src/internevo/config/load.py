"""Reads a config file, applies overrides, and returns one validated ``Config``.

The file overrides the defaults, and the command line overrides the file. All mistakes are reported together, each with its key
and, for an unknown key, the name that was probably meant.
"""

from __future__ import annotations

import ast
import copy
import difflib
import json
import os
import reprlib
import warnings
from functools import reduce
from pathlib import Path
from types import NoneType
from typing import Any

from pydantic import ValidationError

from ..errors import ConfigError, expect, expect_texts
from .files import read_file
from .internevo import translate
from .option import Section, field_kinds, section_of, walk
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
        lines = list(dict.fromkeys(describe(item) for item in error.errors()))
        raise ConfigError(f"{source}: {len(lines)} problem(s)\n" + "\n".join(f"  {line}" for line in lines)) from None


# Overrides -----------------------------------------------------------------------------------------------------------


def apply_override(raw: dict[str, Any], text: str) -> None:
    """Applies one override ``a.b.c=value`` to ``raw``.

    The value is read by the type of its key: as it stands if the key's values are texts, otherwise as ``parse_value`` does.
    """
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"override {text!r} does not have the form key.path=value")
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
    section = _section_at(parents)
    field = section.model_fields.get(last) if section else None
    kinds = field_kinds(field) if field else set()
    parsed = parse_value(value)
    is_text = str in kinds and not kinds & {int, float, bool, Any}
    node[last] = value if is_text and not isinstance(parsed, tuple(kinds)) else parsed


def parse_value(text: str) -> Any:
    """Converts the text of an override: ``true``, ``false``, ``none``, ``null``, a Python literal, or otherwise a string."""
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        with warnings.catch_warnings(action="ignore"):  # of a text that resembles Python
            return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def _section_at(path: list[str]) -> type[Section] | None:
    """Returns the section of a path of names, or None. A number in the path is an index into a list."""
    section: type[Section] = Config
    for name in path:
        if not name.isdigit():
            inner = section_of(section.model_fields[name]) if name in section.model_fields else None
            if inner is None:
                return None
            section = inner
    return section


# Messages ------------------------------------------------------------------------------------------------------------

EXPECTED = {
    "string_type": "must be text; in a file, put it in quotes",
    "model_type": "must be a section with keys",
    "dict_type": "must be a section with keys",
    "tuple_type": "must be a list",
    "list_type": "must be a list",
    "finite_number": "must be a finite number",
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "must be a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "must be a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "must be True or False"),
}
"""pydantic's kinds of errors -> what they mean in a config."""
BOUNDS = {"ge": "at least", "gt": "greater than", "le": "at most", "lt": "less than"}


def describe(item: Any) -> str:
    """Turns one error of pydantic into one line: the key, what is wrong, and for an unknown key what was probably meant."""
    path = _key_path(item["loc"])
    key = ".".join(path)
    if item["type"] == "extra_forbidden":
        return f"{key}: unknown key{_hint(path)}"
    if item["type"] == "missing":
        return f"{key}: missing; it is required and has no default"
    bounds = [f"must be {words} {item['ctx'][name]}" for name, words in BOUNDS.items() if name in item.get("ctx", {})]
    message = EXPECTED.get(item["type"]) or "".join(bounds) or item["msg"].removeprefix("Value error, ")
    message = message.replace("Input should be", "must be")
    return f"{key}: {message[0].lower()}{message[1:]} (got {reprlib.repr(item['input'])})"


def _key_path(places: tuple[int | str, ...]) -> list[str]:
    """Returns the names and indices of a key. pydantic adds the type that it has tried, where several are possible."""
    path = [str(place) for place in places]
    for end in range(1, len(path)):
        section = _section_at(path[: end - 1])
        field = section.model_fields.get(path[end - 1]) if section else None
        if field is not None and section_of(field) is None:
            names = field_kinds(field) - {NoneType} == {dict}
            return path[:end] + [part for part in path[end:] if names or part.isdigit()]
    return path


def _hint(path: list[str]) -> str:
    section = _section_at(path[:-1])
    if section is None:
        return ""
    near = difflib.get_close_matches(path[-1], list(section.model_fields), n=1, cutoff=0.6)
    if near:
        return f"; did you mean {'.'.join([*path[:-1], near[0]])}?"
    elsewhere = [
        f"{name}.{path[-1]}"
        for name, field in Config.model_fields.items()
        if isinstance(field.annotation, type)
        and issubclass(field.annotation, Section)
        and path[-1] in field.annotation.model_fields
    ]
    if elsewhere:
        return f"; did you mean {elsewhere[0]}?"
    return "" if len(path) > 1 else "; write the file's own names in capitals or with a leading underscore"


def flat(config: Config) -> dict[str, Any]:
    """Returns key.path -> value, as in JSON, of every option."""
    values, found = json.loads(dump(config)), dict[str, Any]()
    for key, *_ in walk(config):
        found[key] = reduce(lambda section, name: section[name], key.split("."), values)
    return found


def dump(config: Config) -> str:
    """Returns the resolved config as JSON, with all defaults."""
    return config.model_dump_json(indent=2, fallback=repr) + os.linesep
