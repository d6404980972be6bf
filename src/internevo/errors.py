"""Errors that a user can act on. The command line prints their message without a traceback."""

from __future__ import annotations


class InternEvoError(Exception):
    """A run-time failure: what happened, where, and what to do. Exit code 1."""

    exit_code = 1


class UsageError(InternEvoError):
    """Wrong usage of a command or of a function. Exit code 2."""

    exit_code = 2


class ConfigError(UsageError):
    """A config that cannot be used: every problem found, each with the key and the remedy."""


class NotAvailableYet(ConfigError):
    """A config that is right, but asks for something that this version does not do yet."""


class DataError(InternEvoError):
    """A dataset that cannot be read: names the file and the position in it."""


class CheckpointError(InternEvoError):
    """A checkpoint that is incomplete, damaged, or does not fit the model."""
