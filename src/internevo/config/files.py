"""Reads config files into dicts: YAML, TOML and JSON, and Python files, which are executed."""

from __future__ import annotations

import difflib
import json
import os
import re
import sys
import traceback
import types
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .schema import Config


def read_file(path: Path) -> dict[str, Any]:
    """Reads a config file into a dict. Only a ``.py`` file is executed.

    Raises:
        ConfigError: if the file cannot be read; the message names the file and, where there is one, the line.
    """
    readers = {".yaml": read_yaml, ".yml": read_yaml, ".toml": read_toml, ".json": read_json}
    if not path.is_file():
        raise ConfigError(f"config file {path} {'is not a file' if path.exists() else 'does not exist'}")
    if path.suffix not in (".py", *readers):
        raise ConfigError(f"config file {path}: unknown file type {path.suffix!r}; use .py, .yaml, .toml or .json")
    try:
        content = path.read_bytes()
        raw = read_python(path, content) if path.suffix == ".py" else readers[path.suffix](content.decode("utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"config file {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"config file {path} is not UTF-8 at byte {error.start} ({content[error.start]:#04x})") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"config file {path}: {error}") from error
    if not isinstance(raw, dict):
        what = "is empty" if raw is None else "must be a mapping of keys to values at its top level"
        raise ConfigError(f"config file {path} {what}")
    return raw


def read_yaml(text: str) -> Any:
    """Reads YAML, without making Python objects from tags. Unlike YAML 1.1, 1e-4 is a number, and no key may occur twice.

    Raises:
        ValueError: if it is not YAML; the message has the line.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)
            names: list[Any] = []
            for key, _ in node.value:
                if key.value in names:
                    raise ValueError(f"line {key.start_mark.line + 1}: the key {key.value!r} occurs twice")
                names.append(key.value)
            return node

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?|\d*\.\d+)[eE][-+]?\d+$"), "-+.0123456789")
    try:
        return yaml.load(text, Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise ValueError(f"{f'line {mark.line + 1}: ' if mark else ''}not YAML: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML: {error}") from error


def read_toml(text: str) -> Any:
    """Reads TOML.

    Raises:
        ValueError: if it is not TOML; the message has the line.
    """
    import tomllib

    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"not TOML: {error}") from error


def read_json(text: str) -> Any:
    """Reads JSON. No key may occur twice.

    Raises:
        ValueError: if it is not JSON; the message has the line.
    """

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} occurs twice")
        return found

    try:
        return json.loads(text, object_pairs_hook=no_duplicates)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {error.lineno}: not JSON: {error.msg} (column {error.colno})") from error


def read_python(path: Path, content: bytes) -> dict[str, Any]:
    """Executes a Python config and returns its top-level names that are config keys. What it prints goes to standard error.

    As in InternEvo's files, names in capitals that are not config keys are constants of the file (``SEQ_LEN``). They are left
    out, and so are modules, classes, functions and names with a leading underscore, unless they have the name of a key.

    Raises:
        ConfigError: if the file raises an exception; the message has the line.
    """
    namespace: dict[str, Any] = {"__file__": str(path), "__name__": "__config__"}
    try:
        with _imports_for(path), redirect_stdout(sys.stderr):
            exec(compile(content, str(path), "exec"), namespace)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit too: a config cannot end the program without a message
        raise ConfigError(f"config file {path}{_place(path, error)}: {type(error).__name__}: {error}") from error
    return {name: value for name, value in namespace.items() if _is_key(name, value)}


def _place(path: Path, error: BaseException) -> str:
    """Returns the line of a config file at which an exception came up; and the other file, if it is from one."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [(frame.filename, frame.lineno) for frame in frames if not frame.filename.startswith("<")]
    if isinstance(error, SyntaxError) and error.filename:
        lines.append((error.filename, error.lineno))
    own = [line for file, line in lines if file == str(path)]
    other = f" ({lines[-1][0]}, line {lines[-1][1]})" if own and lines[-1][0] != str(path) else ""
    return f", line {own[-1]}{other}" if own else ""


def _is_key(name: str, value: Any) -> bool:
    if name in Config.model_fields:
        return True
    if name.startswith("_") or isinstance(value, types.ModuleType | type) or callable(value):
        return False
    # A name in capitals is a constant of the file, unless it is close to a key in capitals (JOB_NAME) and probably misspelt.
    capitals = [key for key in Config.model_fields if key.isupper()]
    return not name.isupper() or bool(difflib.get_close_matches(name, capitals, n=1, cutoff=0.85))


@contextmanager
def _imports_for(path: Path) -> Iterator[None]:
    """Lets a config import ``internlm.utils.utils.read_base``, ``configs._base_.X``, and modules in its folder or in a folder
    above it, whatever the working directory is. Afterwards these modules are forgotten: another config may have others."""

    @contextmanager
    def read_base() -> Iterator[None]:
        yield

    stubs = {name: types.ModuleType(name) for name in ("internlm", "internlm.utils", "internlm.utils.utils", "configs")}
    stubs["internlm.utils.utils"].read_base = read_base  # type: ignore[attr-defined]
    modules, search = dict(sys.modules), list(sys.path)
    # The config's folder and all folders above it, the nearest first, then the current folder. They come after Python's own and
    # installed modules, which a random.py or torch.py next to a config must not replace.
    folders = [*map(str, path.resolve().parents), os.getcwd()]
    sys.path += folders
    stubs["configs"].__path__ = [configs for folder in [*folders, *search] if os.path.isdir(configs := f"{folder}/configs")]
    for name in [n for n in sys.modules if n.split(".")[0] == "configs"]:
        del sys.modules[name]
    sys.modules.update({k: v for k, v in stubs.items() if k not in sys.modules})
    try:
        yield
    finally:
        sys.path[:] = search
        new = set(sys.modules) - set(modules)
        top_level, places = (name for name in new if "." not in name), set(folders) - set(search)
        own = {*stubs} | {name for name in top_level if _folder_of(sys.modules[name]) in places}
        for name in new:
            if name.split(".")[0] in own or name.split(".")[0] == "configs":
                del sys.modules[name]


def _folder_of(module: types.ModuleType) -> str | None:
    """Returns the folder in which a top-level module or package was found."""
    places = list(getattr(module, "__path__", [])) or [getattr(module, "__file__", None)]
    return str(Path(places[0]).parent) if places[0] else None
