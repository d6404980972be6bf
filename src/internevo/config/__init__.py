"""One validated config from InternEvo's files. Imports no PyTorch, so that checking a config is quick."""

from .check import check, missing_features, missing_paths, problems
from .load import dump, load_config, validate
from .option import notices
from .schema import Config

__all__ = [
    "Config",
    "check",
    "dump",
    "load_config",
    "missing_features",
    "missing_paths",
    "notices",
    "problems",
    "validate",
]
