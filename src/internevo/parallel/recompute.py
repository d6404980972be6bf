"""Activation recomputation (https://arxiv.org/abs/1604.06174): layers keep their input only and run again in backward."""

from __future__ import annotations

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint


def recompute(layers: list[nn.Module], share: float) -> None:
    """Makes the first ``int(share * n)`` of ``layers`` recompute, in place. Results do not change."""
    for layer in layers[: int(len(layers) * share)]:
        # Nothing in a layer is random, so the generators' states need not be kept.
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)  # type: ignore[method-assign]
