"""The kinds of arguments of the commands: how their texts are read."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError
from .help import complete_override

PROFILING = ("monitor.memory=true", "monitor.trace=true")
"""What --profiling means, as overrides of the config."""


def parse_path(text: str | Path) -> Path:
    """Converts an argument to a path, in which ``~`` is the home folder. A text that begins with ./ is no name on the hub.

    Raises:
        UsageError: if it cannot be a path. (A path that does not exist is no error here.)
    """
    path = Path(os.path.expanduser(text))
    if str(text).startswith("./") and not os.path.lexists(path):
        path = path.absolute()
    try:
        if not str(text):
            raise UsageError("a path must not be empty; . is the current folder")
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise UsageError(f"{str(path)[:200]}: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"{str(path)!r} is not a path: {error}") from None
    return path


def parse_input(text: str | Path) -> Path:
    """As ``parse_path``, for a file or folder that is read.

    Raises:
        UsageError: if it exists and may not be read.
    """
    path = parse_path(text)
    if path.exists() and not os.access(path, os.R_OK | (os.X_OK if path.is_dir() else 0)):
        raise UsageError(f"{path}: {os.strerror(errno.EACCES)}")
    return path


ConfigFile = Annotated[
    Path, typer.Argument(parser=parse_input, metavar="CONFIG", help="Config file: .py, .yaml, .toml or .json.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY.PATH=VALUE", help="Overrides of config keys.", autocompletion=complete_override),
]


def parse_size(text: str) -> int:
    """Converts a size such as "5GB" or "5GiB" to bytes, as Hugging Face's libraries do."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
    length = 3 if text[-3:].upper() in units else 2
    number, unit = text[:-length], text[-length:].upper()
    try:
        size = int(float(number) * units[unit])
        if size < 1:
            raise ValueError
        return size
    except (KeyError, ValueError, OverflowError):
        raise UsageError(
            f"{text!r} is not a size: give a number above 0 and KB, MB, GB or TB (or KiB, ...), for example 5GB"
        ) from None


def parse_tokens(text: str) -> float:
    """Converts a number of tokens such as "2T" or "300B"."""
    units = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
    number, unit = (text[:-1], units[text[-1].upper()]) if text[-1:].upper() in units else (text, 1.0)
    try:
        tokens = float(number) * unit
        if not 1 <= tokens <= 1e9 * units["T"]:
            raise ValueError
        return tokens
    except ValueError:
        raise UsageError(
            f"{text!r} is not a number of tokens: give a number above 0 and K, M, B or T, for example 2T"
        ) from None
