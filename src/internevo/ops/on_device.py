"""Numbers from the host on a device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def on_device(numbers: Sequence[float], device: torch.device, dtype: torch.dtype = torch.float64) -> Tensor:
    """Returns a vector on ``device``, without waiting for a GPU."""
    vector = torch.tensor(numbers, dtype=dtype)
    return vector.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else vector.to(device)
