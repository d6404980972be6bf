"""Checks the options of a config's ``model`` section that only some families have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ...config.model import Model

DEFAULT_VALUES: dict[str, tuple[Any, ...]] = {
    "add_unit_offset": (None, False),
    "use_swiglu": (None, True),
    "norm_head": (None, False),
    "use_alibi": (False,),
    "use_sliding_window": (False,),
    "num_experts": (1,),
    "num_shared_experts": (0,),
    "shared_expert_intermediate_size": (None,),
}
"""The values that each option may have in a family that does not support the option."""
ANY_VALUE = None
SLIDING_WINDOW: dict[str, tuple[Any, ...] | None] = {"use_sliding_window": ANY_VALUE}
"""What families that support sliding windows give as ``allowed``."""


def problems(model: Model, family: str, allowed: Mapping[str, tuple[Any, ...] | None] | None = None) -> Iterator[str]:
    """Yields one message for each option whose value the family does not support.

    Args:
        allowed: the values that an option may have in this family, or ``ANY_VALUE``. For other options, ``DEFAULT_VALUES``.
    """
    for key, values in {**DEFAULT_VALUES, **(allowed or {})}.items():
        value = getattr(model, key)
        if values is not ANY_VALUE and value not in values:
            yield f"model.{key} = {value!r} is not supported by model_type = {family!r}; leave it out"
    if model.use_sliding_window and not model.sliding_window:
        yield "model.use_sliding_window needs model.sliding_window"
