"""Reads and checks InternEvo's config files. It does not import PyTorch, so that checking a config is quick."""

from .load import dump, flat, validate
from .notes import notes
from .option import notices
from .schema import Config

__all__ = ["Config", "dump", "flat", "notes", "notices", "validate"]
