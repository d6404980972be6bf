"""Whether a config can be trained: the config's own rules and its family's, before any process starts and without PyTorch."""

from __future__ import annotations

from ..config import Config
from ..config import check as rules
from ..errors import ConfigError, NotAvailableYet
from ..models.families import registry


def check(config: Config, world_size: int) -> None:
    """Raises ``ConfigError`` (or ``NotAvailableYet``) unless ``config`` can train on ``world_size`` processes."""
    wrong = problems(config, world_size) + rules.missing_paths(config)
    if wrong:
        raise ConfigError("the config cannot be trained:\n" + "\n".join(f"  {line}" for line in wrong))
    later = missing_features(config)
    if later:
        raise NotAvailableYet("\n".join(later))


def problems(config: Config, world_size: int) -> list[str]:
    """Contradictions inside the config, with its family, and with the world size."""
    return [*registry.problems(config.model_type, config.model), *rules.problems(config, world_size)]


def missing_features(config: Config) -> list[str]:
    """What the config asks for that this version does not do."""
    lines = rules.missing_features(config)
    if config.model_type in registry.LATER:
        lines.append(f"not available yet: models of the family {config.model_type} (model_type)")
    return lines
