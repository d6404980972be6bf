"""Rotary settings in the two forms in which Hugging Face configs hold them (before and since transformers 5)."""

from __future__ import annotations

from typing import Any

from ...config.model import ROPE_KINDS
from ...errors import UsageError
from ..config import Rope


def from_hf(config: dict[str, Any], default_base: float = 10000.0) -> Rope:
    """Reads ``rope_parameters`` (new) or ``rope_theta`` and ``rope_scaling`` (old)."""
    new = config.get("rope_parameters")
    values = dict(new) if isinstance(new, dict) else {}
    base = values.pop("rope_theta", None) or config.get("rope_theta") or default_base
    scaling = values or config.get("rope_scaling") or {}
    return from_scaling(scaling, float(base))


def from_scaling(scaling: dict[str, Any], base: float) -> Rope:
    """From a ``rope_scaling`` dict: {"rope_type" (or "type"), "factor", ...}."""
    if scaling.get("partial_rotary_factor", 1.0) != 1.0:
        raise UsageError(
            f"partial_rotary_factor = {scaling['partial_rotary_factor']} is not known here: whole heads are turned"
        )
    options = {
        k: v
        for k, v in scaling.items()
        if k not in ("rope_type", "type", "factor", "rope_theta", "partial_rotary_factor") and v is not None
    }
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in ROPE_KINDS:
        raise UsageError(f"rope_scaling of kind {kind!r} is not known here (known: {', '.join(ROPE_KINDS)})")
    return Rope(base=base, kind=kind, factor=float(scaling.get("factor") or 1.0), options=options)


def to_hf(rope: Rope) -> dict[str, Any]:
    """The old keys (read by every version) and the new one."""
    scaling = None
    if rope.kind != "default":
        scaling = {"rope_type": rope.kind, "type": rope.kind, "factor": rope.factor, **rope.options}
    parameters = {"rope_theta": rope.base, "rope_type": rope.kind, **(scaling or {})}
    parameters.pop("type", None)
    return {"rope_theta": rope.base, "rope_scaling": scaling, "rope_parameters": parameters}
