"""Numbers with units, as people read them."""

from __future__ import annotations

import math
from datetime import timedelta


def amount(number: float) -> str:
    """Returns a count in three digits: 950, 12.3k, 1.64M, 2.10B, 15.0T."""
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= 0.9995 * unit:
            return _digits(number / unit) + name
    return f"{number:.0f}"


def flops(tflops: float) -> str:
    """Returns a speed in TFLOPS; below 0.1 of them in GFLOPS, and below 0.1 of those in MFLOPS."""
    unit, name = next(
        ((unit, name) for unit, name in ((1.0, "TFLOPS"), (1e-3, "GFLOPS")) if tflops >= 0.1 * unit), (1e-6, "MFLOPS")
    )
    return f"{tflops / unit:.3g} {name}"


def size(nbytes: float) -> str:
    """Returns a number of bytes with a unit."""
    unit, name = next(((unit, name) for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if nbytes >= unit), (1, "B"))
    return f"{nbytes / unit:.3g} {name}" if nbytes < 1000 * unit else f"{nbytes / unit:,.0f} {name}"


def duration(seconds: float) -> str:
    """Returns a time in its two largest units: 3.2 s, 3 min 20 s, 2 h 5 min, 3 d 4 h."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    left = round(seconds)
    for unit, name, below, name_below in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if left >= unit:
            return f"{left // unit} {name} {left % unit // below} {name_below}"
    return f"{left} s"


def clock(seconds: float) -> str:
    """Returns a time as 0:03:20, or as 2 days, 0:03:20."""
    return str(timedelta(seconds=round(seconds)))


def decimals(number: float, digits: int, least: int) -> int:
    """Returns the number of decimals with which a small number has this many digits, and at least ``least`` (at most 9)."""
    return min(9, max(least, digits - 1 - math.floor(math.log10(abs(number))))) if number else least


def _digits(number: float) -> str:
    """Returns a number from 1 to 1,000 (or a larger one) in three digits."""
    decimals = max(0, 2 - math.floor(math.log10(abs(number) * 1.0005)))
    return f"{number:,.{decimals}f}"
