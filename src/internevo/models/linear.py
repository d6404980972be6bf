"""A linear layer whose weight has named axes, and the low-rank addition that it may have.

LoRA (https://arxiv.org/abs/2106.09685): y = W x + alpha / rank * B A x, of which A and B are trained.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

MARK = ".lora."
"""In the names of the adapters' weights."""


def own(weight: Tensor) -> Tensor:
    """This rank's part of a weight; a strategy that cuts weights puts its own function in place of this."""
    return weight


class Adapter(nn.Module):
    """alpha / rank * B A x. B begins as zeros, so that the model begins as it was."""

    def __init__(self, linear: Linear, rank: int, alpha: float) -> None:
        super().__init__()
        out_axis, in_axis = linear.axes
        self.a = Linear("rank", rank, in_axis, linear.in_features)
        self.b = Linear(out_axis, linear.out_features, "rank", rank)
        self.scale = alpha / rank
        self.own: Callable[[Tensor], Tensor] = own

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.own(self.a.weight)), self.own(self.b.weight)) * self.scale


class Linear(nn.Linear):
    """y = x W^T + b, whose weight [out, in] has named axes."""

    def __init__(self, out_axis: str, out_size: int, in_axis: str, in_size: int, bias: bool = False) -> None:
        super().__init__(in_size, out_size, bias=bias)
        self.axes = (out_axis, in_axis)
        self.lora: Adapter | None = None
        """A low-rank addition, which alone is trained."""

    def forward(self, x: Tensor) -> Tensor:
        return self.adapt(x, F.linear(x, self.weight, self.bias))

    def adapt(self, x: Tensor, y: Tensor) -> Tensor:
        """``y``, what the weight makes of ``x``, and what the adapter adds."""
        return y if self.lora is None else y + self.lora(x)
