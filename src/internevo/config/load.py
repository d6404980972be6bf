"""Reads a config file, applies overrides, and returns one validated ``Config``.

The file overrides the defaults, and the command line overrides the file. All mistakes are reported together, each with its key
and, for an unknown key, the name that was probably meant.
"""

from __future__ import annotations

import ast
import difflib
import json
import os
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from ..errors import ConfigError
from .internevo import translate
from .option import Section, section_of
from .schema import Config


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Reads a config file (.py, .yaml, .yml, .toml or .json), applies ``key.path=value`` overrides, and validates the result.

    Raises:
        ConfigError: if the config has mistakes; one line for each.
    """
    raw = read_file(Path(path))
    for text in overrides:
        apply_override(raw, text)
    return validate(raw, source=str(path))


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
        lines = [describe(item) for item in error.errors()]
        raise ConfigError(f"{source}: {len(lines)} problem(s)\n" + "\n".join(f"  {line}" for line in lines)) from None


# Reading files -------------------------------------------------------------------------------------------------------


def read_file(path: Path) -> dict[str, Any]:
    """Reads a config file into a dict. Only a ``.py`` file is executed."""
    if not path.is_file():
        raise ConfigError(f"config file {path} does not exist")
    readers = {".py": read_python, ".yaml": read_yaml, ".yml": read_yaml, ".toml": read_toml, ".json": read_json}
    if path.suffix not in readers:
        raise ConfigError(f"config file {path}: unknown file type {path.suffix!r}; use .py, .yaml, .toml or .json")
    try:
        raw = readers[path.suffix](path)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"config file {path} cannot be read: {type(error).__name__}: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"config file {path}: its top level must be a mapping of keys to values")
    return raw


def read_yaml(path: Path) -> Any:
    """Reads a YAML file, without making Python objects from tags."""
    import yaml

    return yaml.safe_load(path.read_text(encoding="utf-8"))


def read_toml(path: Path) -> Any:
    """Reads a TOML file."""
    import tomllib

    return tomllib.loads(path.read_text(encoding="utf-8"))


def read_json(path: Path) -> Any:
    """Reads a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_python(path: Path) -> dict[str, Any]:
    """Executes a Python config and returns its top-level names that are config keys.

    As in InternEvo's files, names in capitals that are not config keys are constants of the file (``SEQ_LEN``). They are left
    out, and so are modules, classes, functions and names with a leading underscore.
    """
    namespace: dict[str, Any] = {"__file__": str(path), "__name__": "__config__"}
    with _imports_for(path):
        exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), namespace)
    return {name: value for name, value in namespace.items() if _is_key(name, value)}


def _is_key(name: str, value: Any) -> bool:
    if name.startswith("_") or isinstance(value, types.ModuleType | type) or callable(value):
        return False
    if name in Config.model_fields or not name.isupper():
        return True
    # A name in capitals is a constant of the file, unless it is close to a key in capitals (JOB_NAME) and probably misspelt.
    return bool(difflib.get_close_matches(name, [k for k in Config.model_fields if k.isupper()], n=1, cutoff=0.85))


@contextmanager
def _imports_for(path: Path) -> Iterator[None]:
    """Lets a config import ``internlm.utils.utils.read_base`` and ``configs._base_.X``, whatever the working directory is."""

    @contextmanager
    def read_base() -> Iterator[None]:
        yield

    stubs = {name: types.ModuleType(name) for name in ("internlm", "internlm.utils", "internlm.utils.utils", "configs")}
    stubs["internlm.utils.utils"].read_base = read_base  # type: ignore[attr-defined]
    modules, search = dict(sys.modules), list(sys.path)
    # The config's folder and all folders above it, the nearest first, then the current folder. They come after Python's own and
    # installed modules, which a random.py or torch.py next to a config must not replace.
    folders = [*map(str, path.resolve().parents), "."]
    sys.path += folders
    stubs["configs"].__path__ = [configs for folder in [*folders, *search] if os.path.isdir(configs := f"{folder}/configs")]
    for name in [n for n in sys.modules if n == "configs" or n.startswith("configs.")]:
        del sys.modules[name]
    sys.modules.update({k: v for k, v in stubs.items() if k not in sys.modules})
    try:
        yield
    finally:
        sys.path[:] = search
        for name in set(sys.modules) - set(modules):
            if name in stubs or name == "configs" or name.startswith("configs."):
                del sys.modules[name]


# Overrides -----------------------------------------------------------------------------------------------------------


def apply_override(raw: dict[str, Any], text: str) -> None:
    """Applies one override ``a.b.c=value`` to ``raw``. A value that is not a Python literal is a string."""
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
    node[last] = parse_value(value)


def parse_value(text: str) -> Any:
    """Converts the text of an override: ``true``, ``false``, ``none``, ``null``, a Python literal, or otherwise a string."""
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


# Messages ------------------------------------------------------------------------------------------------------------


def describe(item: Any) -> str:
    """Turns one error of pydantic into one line: the key, what is wrong, and for an unknown key what was probably meant."""
    path = [str(part) for part in item["loc"]]
    key = ".".join(path)
    if item["type"] == "extra_forbidden":
        return f"{key}: unknown key{_hint(path)}"
    if item["type"] == "missing":
        return f"{key}: missing; it is required and has no default"
    message = item["msg"].removeprefix("Value error, ")
    return f"{key}: {message[0].lower()}{message[1:]} (got {item['input']!r})"


def _hint(path: list[str]) -> str:
    section: type[BaseModel] = Config
    for name in path[:-1]:
        if not name.isdigit():  # a number is an index into a list
            inner = section_of(section.model_fields[name]) if name in section.model_fields else None
            if inner is None:
                return ""
            section = inner
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


def dump(config: Config) -> str:
    """Returns the resolved config as JSON, with all defaults."""
    return config.model_dump_json(indent=2) + os.linesep
