"""Choices of a config's ``model`` section that only some families have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ...config.model import Model

PLAIN: dict[str, tuple[Any, ...]] = {
    "add_unit_offset": (None, False),
    "use_swiglu": (None, True),
    "norm_head": (None, False),
    "use_alibi": (False,),
    "use_sliding_window": (False,),
    "num_experts": (1,),
    "num_shared_experts": (0,),
    "shared_expert_intermediate_size": (None,),
}
"""What a family without the choice takes."""
ANY = None
WINDOWS: dict[str, tuple[Any, ...] | None] = {"use_sliding_window": ANY}
"""The choice of families with sliding windows."""


def problems(model: Model, family: str, own: Mapping[str, tuple[Any, ...] | None] | None = None) -> Iterator[str]:
    """Choices that the family does not have.

    Args:
        own: values that the family takes, where they differ from ``PLAIN``; ``ANY``: all.
    """
    for key, values in {**PLAIN, **(own or {})}.items():
        value = getattr(model, key)
        if values is not ANY and value not in values:
            yield f"model.{key} = {value!r} does not go with model_type = {family!r}"
    if model.use_sliding_window and not model.sliding_window:
        yield "model.use_sliding_window needs model.sliding_window"
