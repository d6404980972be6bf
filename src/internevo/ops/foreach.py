"""Operators on many tensors at once, one kernel for all on a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copies each source into its target, converted to its dtype."""
    torch._foreach_copy_(list(targets), list(sources))


def scale(tensors: Sequence[Tensor], factor: float) -> None:
    """Multiplies each, in place."""
    torch._foreach_mul_(list(tensors), factor)


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """L2 norm of each, as one vector."""
    return torch.stack(torch._foreach_norm(list(tensors)))
