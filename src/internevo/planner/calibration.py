"""What is reached of a machine's peaks: a few numbers, fitted to measurements, in a TOML file."""

from __future__ import annotations

import tomllib
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from ..errors import UsageError
from . import tomlfile

VERSION = 1
"""Of the meaning of the numbers. It changes with the formulas, because numbers that were fitted to others are wrong then."""


@dataclass(frozen=True)
class Calibration:
    """Efficiencies (1 is the peak), latencies in seconds, and how much communication hides."""

    products: float = 0.78
    """Matrix products in bf16 and fp16, large ones."""
    products_fp8: float = 0.65
    """Matrix products in fp8, with the conversions around them."""
    attention: float = 0.55
    """The attention kernel, of the peak in bf16."""
    memory: float = 0.7
    """Kernels that only move memory, of its bandwidth."""
    inside: float = 0.7
    """Collectives inside a node, of the link's bandwidth."""
    across: float = 0.7
    """Collectives across nodes, of the network's bandwidth."""
    overlap: float = 0.8
    """The share of a collective that runs at the same time as computation, if the strategy lets it, without slowing it down."""
    hop_inside: float = 4e-6
    """Seconds of one step of a collective inside a node."""
    hop_across: float = 1.5e-5
    """Seconds of one step of a collective across nodes."""
    launch: float = 4e-6
    """Seconds that a kernel takes besides its work."""
    step: float = 5e-3
    """Seconds of a step that depend on nothing: data, logging, waiting for the slowest rank."""

    def save(self, path: Path, comment: str = "") -> None:
        """Writes it as TOML."""
        tomlfile.save(path, {"version": VERSION, **asdict(self)}, comment)

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Reads it.

        Raises:
            UsageError: if the file cannot be read, is of another version, or does not have exactly these numbers.
        """
        try:
            values = tomllib.loads(path.read_text())
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise UsageError(f"the calibration {path} cannot be read: {error}") from error
        version, known = values.pop("version", None), [field.name for field in fields(cls)]
        if version != VERSION:
            found = "has no version" if version is None else f"is of version {version!r}"
            raise UsageError(
                f"the calibration {path} {found}; this is version {VERSION}. Measure again: internevo plan --calibrate"
            )
        problems = [f"{key} is missing" for key in known if key not in values]
        for key, value in values.items():
            if key not in known:
                problems.append(tomlfile.unknown(key, known))
            elif isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
                problems.append(f"{key} = {value!r} must be a number of at least 0")
            elif key in EFFICIENCIES and not 0 < value <= 1:
                problems.append(f"{key} = {value!r} must be more than 0 and at most 1")
        if problems:
            raise UsageError(f"the calibration {path} cannot be used:\n" + "\n".join(f"  {line}" for line in problems))
        return cls(**{key: float(value) for key, value in values.items()})


EFFICIENCIES = ("products", "products_fp8", "attention", "memory", "inside", "across", "overlap")
"""The fields that are shares."""
