"""Backward passes in two parts, as zero-bubble schedules need them (https://arxiv.org/abs/2401.10241): first the gradients of
the inputs, which the stage before waits for, and later the gradients of the weights.

A linear with a deferred weight leaves its weight out of autograd's graph. Its backward pass computes the gradient of its input,
and leaves a function that computes the gradient of the weight. Norms, biases, adapters, the embedding and the head are small,
or computed with the loss; their gradients are not deferred.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..models.decoder import Decoder
from ..models.linear import ADAPTER_INFIX, Linear
from ..models.moe import ExpertLinear
from ..ops.compiler import not_compiled

Products = Callable[[], Sequence[Tensor]]
"""Computes the gradients of weights."""


class Deferred:
    """The gradients of weights that the backward passes of a stage have left for later."""

    def __init__(self) -> None:
        self._left: list[Callable[[], None]] = []

    def apply(self, model: Decoder) -> None:
        """Makes the linears of a model defer the gradients of their weights. (isp's do it by themselves.)"""
        for name, module in model.named_modules():
            if isinstance(module, Linear) and ADAPTER_INFIX not in f"{name}.":
                module.product = self.linear
            elif isinstance(module, ExpertLinear):
                module.product = self.grouped_linear
                # Compiled, it could share a graph with other results, which the first part of the backward pass frees.
                module.local_part = not_compiled(module.local_part)

    @not_compiled
    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Computes x W^T + b. It is not compiled: compiled code could not leave anything."""
        y = _Linear.apply(x, self, (weight,)) if weight.requires_grad else F.linear(x, weight)
        return y if bias is None else y + bias

    @not_compiled
    def grouped_linear(self, rows: Tensor, weight: Tensor, ends: Tensor, complete: bool) -> Tensor:
        """Multiplies rows by the weights of their experts. Arguments as for ``ops.grouped_linear``."""
        if not weight.requires_grad:
            return ops.grouped_linear(rows, weight, ends, complete)
        return _GroupedLinear.apply(rows, self, (weight,), ends, complete)

    def leave(self, weights: Sequence[Tensor], products: Products) -> None:
        """Leaves the gradients of weights for later.

        Args:
            weights: parameters, or what was computed from them: autograd takes the gradients on to the parameters.
            products: must have no tensor with a graph, which would keep the input of the stage alive.
        """
        self._left.append(partial(_accumulate, weights, products))

    def take(self) -> list[Callable[[], None]]:
        """Returns what was left since the last call, to be called in this order."""
        left, self._left = self._left, []
        return left


def product(grad: Tensor, x: Tensor) -> Tensor:
    """Returns the gradient [out, in] of a weight, from the gradient of the output [..., out] and the input [..., in]."""
    return grad.flatten(0, -2).t() @ x.flatten(0, -2)


def _accumulate(weights: Sequence[Tensor], products: Products) -> None:
    torch.autograd.backward(_Gradients.apply(products, *weights))


class _Linear(torch.autograd.Function):
    """A linear whose backward pass leaves the gradient of the weight for later."""

    @staticmethod
    def forward(ctx, x: Tensor, deferred: Deferred, weights: tuple[Tensor]):  # type: ignore[no-untyped-def]
        # In a tuple, autograd does not see the weight.
        ctx.deferred, ctx.weight = deferred, weights[0]
        ctx.save_for_backward(x)
        return F.linear(x, weights[0])

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        x = ctx.saved_tensors[0].detach()
        ctx.deferred.leave([ctx.weight], lambda: [product(grad, x)])
        return grad @ ctx.weight, None, None


class _GroupedLinear(torch.autograd.Function):
    """Grouped products whose backward pass leaves the gradient of the weights for later."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, rows: Tensor, deferred: Deferred, weights: tuple[Tensor], ends: Tensor, complete: bool
    ):
        ctx.deferred, ctx.weight, ctx.complete = deferred, weights[0], complete
        ctx.save_for_backward(rows, ends)
        return ops.grouped_linear(rows, weights[0].detach(), ends, complete)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        rows, ends = (saved.detach() for saved in ctx.saved_tensors)
        ctx.deferred.leave([ctx.weight], lambda: [ops.grouped_product(grad, rows, ends)])
        return ops.grouped_linear(grad, ctx.weight.detach().transpose(1, 2), ends, ctx.complete), None, None, None, None


class _Gradients(torch.autograd.Function):
    """A number that depends on weights, and whose gradients with respect to them are what ``products`` returns."""

    @staticmethod
    def forward(ctx, products: Products, *weights: Tensor):  # type: ignore[no-untyped-def]
        ctx.products = products
        return weights[0].new_zeros(())

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        return None, *ctx.products()
