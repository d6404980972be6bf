"""Reads and writes the options of the rotary embedding in Hugging Face configs, which have new keys since transformers 5."""

from __future__ import annotations

from typing import Any

from ...config.model import ROPE_KINDS
from ...errors import UsageError
from ..config import Rope


def from_hf(config: dict[str, Any], default_base: float = 10000.0) -> Rope:
    """Returns the rotary embedding of a ``config.json``, from the new key ``rope_parameters`` or from the old keys
    ``rope_theta`` and ``rope_scaling``."""
    new = config.get("rope_parameters")
    values = dict(new) if isinstance(new, dict) else {}
    base = values.pop("rope_theta", None) or config.get("rope_theta") or default_base
    scaling = values or config.get("rope_scaling") or {}
    return from_scaling(scaling, float(base))


def from_scaling(scaling: dict[str, Any], base: float) -> Rope:
    """Returns the rotary embedding of a ``rope_scaling`` dict, whose keys are "rope_type" (or "type"), "factor" and others.

    Raises:
        UsageError: if the kind of scaling is not supported.
    """
    if scaling.get("partial_rotary_factor", 1.0) != 1.0:
        raise UsageError(
            f"partial_rotary_factor = {scaling['partial_rotary_factor']} is not supported: only 1.0 is (all of a head rotates)"
        )
    options = {
        k: v
        for k, v in scaling.items()
        if k not in ("rope_type", "type", "factor", "rope_theta", "partial_rotary_factor") and v is not None
    }
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in ROPE_KINDS:
        raise UsageError(f"rope_scaling with rope_type = {kind!r} is not supported (supported: {', '.join(ROPE_KINDS)})")
    return Rope(base=base, kind=kind, factor=float(scaling.get("factor") or 1.0), options=options)


def to_hf(rope: Rope) -> dict[str, Any]:
    """Returns the old keys, which every version of transformers reads, and the new key."""
    scaling = None
    if rope.kind != "default":
        scaling = {"rope_type": rope.kind, "type": rope.kind, "factor": rope.factor, **rope.options}
    parameters = {"rope_theta": rope.base, "rope_type": rope.kind, **(scaling or {})}
    parameters.pop("type", None)
    return {"rope_theta": rope.base, "rope_scaling": scaling, "rope_parameters": parameters}
