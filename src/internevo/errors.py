"""Errors that a user can correct. The command line prints their message without a traceback."""

from __future__ import annotations


class InternEvoError(Exception):
    """A failure at run time. The message says what happened, where, and what to do. The exit code is 1."""

    exit_code = 1


class UsageError(InternEvoError):
    """Wrong usage of a command or a function. The exit code is 2."""

    exit_code = 2


class ConfigError(UsageError):
    """A config that cannot be used. The message has one line per problem, with the key and what to change."""


class NotAvailableYet(ConfigError):  # noqa: N818
    """A valid config that asks for a feature that this version does not have yet."""


class DataError(InternEvoError):
    """Data that cannot be read. The message names the file and the position in it."""


class CheckpointError(InternEvoError):
    """A checkpoint that is incomplete, damaged, or of another model."""


def expect(value: object, kind: type | tuple[type, ...], what: str) -> None:
    """Checks the type of an argument that a program gives to a function of the library.

    Args:
        what: the words of the message: what the argument must be.

    Raises:
        UsageError: if it is of another type.
    """
    if not isinstance(value, kind):
        raise UsageError(f"{what}, and not {type(value).__name__} ({str(value)[:60]!r})")


def expect_texts(value: object, name: str) -> None:
    """Checks an argument that is a list or tuple of texts. One text alone is none: its letters would be taken for texts.

    Raises:
        UsageError: if it is something else.
    """
    if not isinstance(value, list | tuple) or not all(isinstance(text, str) for text in value):
        raise UsageError(
            f"{name} must be a list of texts, and not {value!r}" + (f": {name}=[{value!r}]" * isinstance(value, str))
        )
