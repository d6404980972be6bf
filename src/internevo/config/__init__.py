"""One validated config from InternEvo's files. Imports no PyTorch, so that checking a config is quick."""

from .load import dump, load_config, validate
from .option import notices
from .schema import Config

__all__ = ["Config", "dump", "load_config", "notices", "validate"]
