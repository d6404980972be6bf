"""Reads and writes the options of the rotary embedding in Hugging Face configs, which have new keys since transformers 5."""

from __future__ import annotations

from typing import Any

from ...config import rope
from ...errors import UsageError
from ..config import Rope


def from_hf(config: dict[str, Any], default_base: float = 10000.0) -> Rope:
    """Returns the rotary embedding of a ``config.json``, from the new key ``rope_parameters``, the old keys ``rope_theta`` and
    ``rope_scaling``, or both; and from ``partial_rotary_factor``.

    Raises:
        UsageError: if a value is wrong, or the new and the old keys contradict each other.
    """
    found = []
    outside = {rope.SHARE: config[rope.SHARE]} if config.get(rope.SHARE) is not None else {}
    for key in ("rope_parameters", "rope_scaling"):
        values, base = config.get(key), config.get("rope_theta")
        if values is None or values == {}:
            continue
        if isinstance(values, dict):
            if None not in (base, values.get("rope_theta")) and base != values["rope_theta"]:
                raise UsageError(f"rope_theta = {base} contradicts {key}, whose rope_theta is {values['rope_theta']}")
            base = values.get("rope_theta", base)
            values = {name: value for name, value in values.items() if name != "rope_theta"}
            values = values if "type" in values else {"rope_type": "default", **values}
            if outside and values.get(rope.SHARE) not in (None, outside[rope.SHARE]):
                raise UsageError(f"{rope.SHARE} = {outside[rope.SHARE]} contradicts {key}, where it is {values[rope.SHARE]}")
            values = {**values, **outside}
        found.append(from_scaling(values, _base(base, default_base), key))
    if found and found[0] != found[-1]:
        raise UsageError(f"rope_parameters and rope_scaling contradict each other: {found[0]} and {found[-1]}")
    plain = from_scaling({"rope_type": "default", **outside}, _base(config.get("rope_theta"), default_base))
    return found[0] if found else plain


def _base(value: Any, default: float) -> float:
    if value is None:
        return default
    if not rope.is_number(value) or value <= 0:
        raise UsageError(f"rope_theta = {value!r} must be a number above 0")
    return float(value)


def from_scaling(scaling: Any, base: float, key: str = "rope_scaling") -> Rope:
    """Returns the rotary embedding of a ``rope_scaling`` dict, whose keys are "rope_type" (or "type"), "factor" and others.

    Args:
        key: the name of the dict, for messages.

    Raises:
        UsageError: if the kind of scaling is not supported, or one of its values is wrong.
    """
    if wrong := list(rope.problems(scaling)):
        raise UsageError("; ".join(f"{key}: {line}" for line in wrong))
    kind = scaling.get("rope_type") or scaling["type"]
    options = {name: scaling[name] for name in rope.KINDS[kind] if name != "factor" and scaling.get(name) is not None}
    share = float(scaling.get(rope.SHARE) or 1.0)
    return Rope(base, kind, float(scaling.get("factor") or 1.0), options, share)


def to_hf(value: Rope) -> dict[str, Any]:
    """Returns the old keys, which every version of transformers reads, and the new key."""
    scaling, share = None, {rope.SHARE: value.share} if value.share != 1.0 else {}
    if value.kind != "default":
        scaling = {"rope_type": value.kind, "type": value.kind, "factor": value.factor, **value.options}
    parameters = {"rope_theta": value.base, "rope_type": value.kind, **(scaling or {}), **share}
    parameters.pop("type", None)
    return {"rope_theta": value.base, "rope_scaling": scaling, "rope_parameters": parameters, **share}
