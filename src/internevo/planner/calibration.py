"""What is reached of a machine's peaks: a few numbers, fitted to measurements, in a TOML file."""

from __future__ import annotations

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
            values = tomlfile.read(path)
        except ValueError as error:
            raise UsageError(f"the calibration {path} cannot be read: {error}") from error
        version, known = values.pop("version", None), [field.name for field in fields(cls)]
        if version != VERSION:
            found = "has no version" if version is None else f"is of version {version!r}"
            raise UsageError(
                f"the calibration {path} {found}; this is version {VERSION}. Measure again: internevo plan --calibrate"
            )
        problems = [f"{key} is missing" for key in known if key not in values]
        for key, value in values.items():
            least, most = (SMALLEST, 1) if key in EFFICIENCIES else (0, LONGEST)
            is_known = key in known
            problems.append(tomlfile.wrong_number(key, value, least, most) if is_known else tomlfile.unknown(key, known))
        problems = [problem for problem in problems if problem]
        if problems:
            raise UsageError(f"the calibration {path} cannot be used:\n" + "\n".join(f"  {line}" for line in problems))
        return cls(**{key: float(value) for key, value in values.items()})


EFFICIENCIES = ("products", "products_fp8", "attention", "memory", "inside", "across", "overlap")
"""The fields that are shares."""
SMALLEST, LONGEST = 1e-6, 1e6
"""The smallest share, and the most seconds."""
