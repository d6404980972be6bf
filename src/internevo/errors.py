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
