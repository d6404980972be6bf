"""Operators on many tensors at once. On a GPU, one kernel computes all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copies each source into its target and converts it to the target's dtype."""
    torch._foreach_copy_(list(targets), list(sources))


def scale(tensors: Sequence[Tensor], factor: float) -> None:
    """Multiplies each tensor by ``factor``, in place."""
    torch._foreach_mul_(list(tensors), factor)


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """Returns the L2 norm of each tensor, as one vector."""
    return torch.stack(torch._foreach_norm(list(tensors)))
