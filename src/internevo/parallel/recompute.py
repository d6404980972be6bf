"""Activation recomputation (https://arxiv.org/abs/1604.06174): layers keep their input only and run again in backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


def recompute(layers: list[nn.Module], share: float) -> None:
    """Makes the first ``int(share * n)`` of ``layers`` recompute, in place. Results do not change."""
    for layer in layers[: int(len(layers) * share)]:
        layer.forward = _recomputed(layer.forward)  # type: ignore[method-assign]


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A function of its own, which a compiler can trace (it cannot trace functools.partial)."""

    def run(*inputs: Any) -> Any:
        # Nothing in a layer is random, so the generators' states need not be kept.
        return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False)

    return run
