"""Words of messages."""

from __future__ import annotations


def counted(number: int, noun: str) -> str:
    """Returns a number with its noun: "1 step", "2,000 steps", "3 passes", "4 entries"."""
    return f"{number:,} {plural(number, noun)}"


def plural(number: int, noun: str) -> str:
    """Returns a regular noun as it stands after a number."""
    if number == 1:
        return noun
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "ch")) else "s")
