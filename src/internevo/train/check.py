"""Checks whether a config can be trained, by the rules of the config and of its family.

It needs no PyTorch, and runs before any process is started.
"""

from __future__ import annotations

from importlib.util import find_spec

from ..config import Config
from ..config import check as rules
from ..errors import ConfigError, NotAvailableYet
from ..models.families import registry


def check(config: Config, world_size: int) -> None:
    """Checks that ``config`` can be trained on ``world_size`` processes.

    Raises:
        ConfigError: with all problems that were found.
        NotAvailableYet: if the config is right, but needs a feature that this version does not have.
    """
    wrong = problems(config, world_size) + rules.missing_paths(config)
    if config.enable_tb and find_spec("tensorboard") is None:
        wrong.append("enable_tb = True needs the package tensorboard: pip install tensorboard, or set enable_tb = False")
    if wrong:
        raise ConfigError("the config cannot be trained:\n" + "\n".join(f"  {line}" for line in wrong))
    later = missing_features(config)
    if later:
        raise NotAvailableYet("\n".join(later))


def problems(config: Config, world_size: int) -> list[str]:
    """Returns what contradicts itself in the config, what its family does not allow, and what does not fit the world size."""
    return [*registry.problems(config.model_type, config.model), *rules.problems(config, world_size)]


def missing_features(config: Config) -> list[str]:
    """Returns the features that the config needs and this version does not have."""
    lines = rules.missing_features(config)
    if config.model_type in registry.LATER:
        lines.append(f"not available yet: models of the family {config.model_type} (model_type)")
    return lines
