"""The marks of an axis in a picture."""

from __future__ import annotations

import math


def marks(most: float, about: int) -> list[float]:
    """Returns round numbers from 0 to at most ``most``: not more than ``about`` steps of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(most / about))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= most / about)
    return [number * step for number in range(math.floor(most / step) + 1)]
