"""How commands print: any text on any terminal, and errors that no other place has turned into a message."""

from __future__ import annotations

import io
import sys


def print_anything() -> None:
    """Lets standard output and error print characters that their encoding does not have, as escapes (LANG=C, for example)."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def describe_error(error: Exception) -> str:
    """Describes an error that no other place has turned into a message."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, ModuleNotFoundError):
        return f"the Python package {error.name} is missing: pip install {error.name}"
    return f"{type(error).__name__}: {error}"
