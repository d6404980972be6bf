"""What the compiler must know of a tensor."""

from __future__ import annotations

import torch
from torch import Tensor


def mark_dynamic(tensor: Tensor, dim: int) -> None:
    """Says that a size changes from step to step, so that compiled code takes any."""
    torch._dynamo.maybe_mark_dynamic(tensor, dim)
