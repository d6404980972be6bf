"""A linear layer whose weight has named axes, and the low-rank adapter that it may have.

LoRA (https://arxiv.org/abs/2106.09685): y = W x + alpha / rank * B A x, where only A and B are trained.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

ADAPTER_INFIX = ".lora."
"""The names of adapters' weights contain this; the names of other weights do not."""


def local_part(weight: Tensor) -> Tensor:
    """Returns this rank's part of a weight; here, all of it. A strategy that shards weights replaces this function."""
    return weight


class Adapter(nn.Module):
    """alpha / rank * B A x. B is initialised with zeros, so that at first the adapter does not change the model."""

    def __init__(self, linear: Linear, rank: int, alpha: float) -> None:
        super().__init__()
        out_axis, in_axis = linear.axes
        self.a = Linear("rank", rank, in_axis, linear.in_features)
        self.b = Linear(out_axis, linear.out_features, "rank", rank)
        self.scale = alpha / rank
        self.local_part: Callable[[Tensor], Tensor] = local_part

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.local_part(self.a.weight)), self.local_part(self.b.weight)) * self.scale


class Linear(nn.Linear):
    """y = x W^T + b, whose weight [out, in] has named axes."""

    def __init__(self, out_axis: str, out_size: int, in_axis: str, in_size: int, bias: bool = False) -> None:
        super().__init__(in_size, out_size, bias=bias)
        self.axes = (out_axis, in_axis)
        self.lora: Adapter | None = None
        """The adapter. If there is one, only adapters are trained."""
        self.product: Callable[[Tensor, Tensor, Tensor | None], Tensor] = F.linear
        """Multiplies an input by the weight (or this rank's part of it), and adds a bias. A schedule may replace it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.adapt(x, self.product(x, self.weight, self.bias))

    def adapt(self, x: Tensor, y: Tensor) -> Tensor:
        """Adds the output of the adapter for ``x`` to ``y``, the output of the weight; without an adapter, returns ``y``."""
        return y if self.lora is None else y + self.lora(x)
