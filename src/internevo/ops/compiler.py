"""Hints about tensors for ``torch.compile``."""

from __future__ import annotations

import torch
from torch import Tensor


def mark_dynamic(tensor: Tensor, dim: int) -> None:
    """Tells the compiler that a dimension's size changes from step to step, so that it does not compile again for each size."""
    torch._dynamo.maybe_mark_dynamic(tensor, dim)
