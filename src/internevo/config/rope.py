"""The kinds of scaling of the rotary embedding, with the keys of each, their types and ranges. The names are Hugging Face's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Key:
    """A key of a kind of scaling."""

    meaning: str
    """What its value must be, for messages."""
    fits: Callable[[Any], bool]
    required: bool = False


def is_number(value: Any) -> bool:
    """Whether a value is a finite number, and neither a text nor a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _at_least_one(value: Any) -> bool:
    return is_number(value) and value >= 1


def _positive(value: Any) -> bool:
    return is_number(value) and value > 0


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _length(value: Any) -> bool:
    return isinstance(value, int) and _at_least_one(value)


def _numbers(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0 and all(map(_positive, value))


FACTOR = {"factor": Key("a number of at least 1", _at_least_one, required=True)}
LENGTH = {"original_max_position_embeddings": Key("a whole number of at least 1", _length)}
POSITIVE = Key("a number above 0", _positive)
NEEDED = Key("a number above 0", _positive, required=True)
KINDS: dict[str, dict[str, Key]] = {
    "default": {},
    "linear": FACTOR,
    "dynamic": FACTOR,
    "llama3": {**FACTOR, **LENGTH, "low_freq_factor": NEEDED, "high_freq_factor": NEEDED},
    "yarn": {
        **FACTOR,
        **LENGTH,
        **dict.fromkeys(("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"), POSITIVE),
        **dict.fromkeys(("truncate", "finetuned"), Key("true or false", _flag)),
    },
    "longrope": {
        "factor": Key("a number of at least 1", _at_least_one),
        "original_max_position_embeddings": Key("a whole number of at least 1", _length, required=True),
        "attention_factor": POSITIVE,
        **dict.fromkeys(
            ("short_factor", "long_factor"), Key("a list of numbers above 0, one for each pair", _numbers, required=True)
        ),
    },
}
"""Kind -> its keys. (``finetuned`` is in the folders of YaRN's authors, and changes nothing.)"""
SHARE = "partial_rotary_factor"
"""A key of every kind: the share of a head that rotates."""
ORDERED = {"llama3": ("low_freq_factor", 0, "high_freq_factor", 0), "yarn": ("beta_slow", 1, "beta_fast", 32)}
"""Kind -> two keys, each with its default; the first must be less than the second."""


def problems(scaling: Any) -> Iterator[str]:
    """Yields what is wrong with a ``rope_scaling`` or ``rope_parameters`` dict. A key of value None counts as left out."""
    if not isinstance(scaling, dict):
        yield f'{scaling!r} is not an object with keys, for example {{"rope_type": "linear", "factor": 4.0}}'
        return
    given = {key: value for key, value in scaling.items() if value is not None}
    kinds = [given.pop(key) for key in ("rope_type", "type") if key in given]
    if not kinds or any(kind != kinds[0] for kind in kinds) or not isinstance(kinds[0], str) or kinds[0] not in KINDS:
        yield f"its rope_type must be one of {', '.join(KINDS)}, not {' and '.join(map(repr, kinds)) or 'left out'}"
        return
    kind, known = kinds[0], KINDS[kinds[0]]
    share = given.pop(SHARE, 1)
    if not (_positive(share) and share <= 1):
        yield f"{SHARE} = {share!r} must be above 0 and at most 1"
    for name, value in given.items():
        if name not in known:
            yield f"{name!r} is not a key of {kind!r} (keys: {', '.join(known) or 'none'})"
        elif not known[name].fits(value):
            yield f"{name} = {value!r} must be {known[name].meaning}"
    for name, key in known.items():
        if key.required and name not in given:
            yield f"{kind!r} needs {name}, {key.meaning}"
    if kind in ORDERED:
        low, low_default, high, high_default = ORDERED[kind]
        a, b = given.get(low, low_default), given.get(high, high_default)
        if _positive(a) and _positive(b) and a >= b:
            yield f"{low} = {a} must be less than {high} = {b}"
