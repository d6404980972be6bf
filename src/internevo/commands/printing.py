"""How commands print: any text on any terminal, and errors that no other place has turned into a message."""

from __future__ import annotations

import io
import shutil
import sys
import textwrap


def print_anything() -> None:
    """Lets standard output and error print characters that their encoding does not have, as escapes (LANG=C, for example)."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def wrapped(line: str, indent: int = 2) -> str:
    """Breaks a line that is too long for the terminal between words. Elsewhere it stays whole.

    Args:
        indent: the number of spaces before its other parts.
    """
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
    if not width or len(line) <= width:
        return line
    return textwrap.fill(line, width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)


def say(line: str) -> None:
    """Prints a line, with whole words on a terminal."""
    print(wrapped(line), flush=True)


def describe_error(error: Exception) -> str:
    """Describes an error that no other place has turned into a message."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, ModuleNotFoundError):
        return f"the Python package {error.name} is missing: pip install {error.name}"
    return f"{type(error).__name__}: {error}"
