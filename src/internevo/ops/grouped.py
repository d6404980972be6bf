"""Grouped matrix products: rows are sorted by expert, and each expert's group of rows is multiplied by its weight.

Shapes: R rows, D input size, F output size, E experts.

- CUDA in bf16, if a row of the weight is a multiple of 16 bytes: ``torch.nn.functional.grouped_mm``. The host does not have to
  know the sizes of the groups, and so does not wait for the device.
- otherwise: one product per expert. It is a custom operator, so that a compiled layer contains no loop over experts.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor


def grouped_linear(x_RD: Tensor, weight_EFD: Tensor, ends_E: Tensor, complete: bool = True) -> Tensor:
    """Multiplies the rows of each expert e by its weight: x W_e^T.

    Args:
        x_RD: rows, sorted by expert.
        weight_EFD: one weight [F, D] per expert.
        ends_E: int32, the end of each expert's rows, exclusive (``cumsum`` of the sizes of the groups).
        complete: whether every row belongs to an expert. Otherwise the rows after the last end belong to none.

    Returns:
        [R, F], in x's dtype. Rows that belong to no expert are zero.
    """
    if not _has_kernel(x_RD, *weight_EFD.shape[1:]):
        return torch.ops.internevo.grouped_linear(x_RD, weight_EFD, ends_E)
    if complete:
        return F.grouped_mm(x_RD, weight_EFD.transpose(1, 2), offs=ends_E)
    # The kernel does not write rows that belong to no group, nor their gradients; they would be uninitialised memory.
    used = (torch.arange(x_RD.shape[0], device=x_RD.device) < ends_E[-1]).unsqueeze(1)
    out_RF = F.grouped_mm(torch.where(used, x_RD, 0.0), weight_EFD.transpose(1, 2), offs=ends_E)
    return torch.where(used, out_RF, 0.0)


def grouped_product(grad_RF: Tensor, x_RD: Tensor, ends_E: Tensor) -> Tensor:
    """Returns the gradient [E, F, D] of the weights of ``grouped_linear``, from those of its output and its input."""
    if _has_kernel(x_RD, grad_RF.shape[1], x_RD.shape[1]):
        return F.grouped_mm(grad_RF.t(), x_RD, offs=ends_E)
    return torch.ops.internevo.grouped_product(grad_RF, x_RD, ends_E)


def take_rows(x_ID: Tensor, rows_R: Tensor, inverse_R: Tensor, copies: int = 1) -> Tensor:
    """Returns x[rows], where ``rows`` names every row of x exactly ``copies`` times.

    With the inverse permutation, the backward pass is a gather too, and needs no scatter with atomic additions.

    Args:
        x_ID: [R / copies, D].
        rows_R: the row of x that each row of the result is, int64.
        inverse_R: the rows of the result that are copies of row 0 of x, then those of row 1, and so on, int64.
    """
    return _TakeRows.apply(x_ID, rows_R, inverse_R, copies)


def inverse(order_R: Tensor) -> Tensor:
    """Returns the inverse of a permutation, without sorting again."""
    return torch.empty_like(order_R).scatter_(0, order_R, torch.arange(len(order_R), device=order_R.device))


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, rows: Tensor, inverse: Tensor, copies: int) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(inverse)
        ctx.copies = copies
        return x.index_select(0, rows)  # twice as fast as x[rows] on a CPU

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        (inverse,) = ctx.saved_tensors
        grad = grad.index_select(0, inverse)
        return (grad if ctx.copies == 1 else grad.view(-1, ctx.copies, grad.shape[1]).sum(1)), None, None, None


def _has_kernel(x: Tensor, *sizes: int) -> bool:
    # A rank may get no rows at all, and none of the kernel's versions has been seen to take that.
    return x.is_cuda and x.dtype == torch.bfloat16 and len(x) > 0 and all(size * x.dtype.itemsize % 16 == 0 for size in sizes)


def _groups(ends: Tensor) -> Iterator[slice]:
    """Yields the rows of each expert."""
    return (slice(a, b) for a, b in itertools.pairwise([0, *ends.tolist()]))


@torch.library.custom_op("internevo::grouped_linear", mutates_args=())
def _grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    out, end = x.new_empty(x.shape[0], weight.shape[1]), 0
    for rows, weight_FD in zip(_groups(ends), weight, strict=True):
        torch.mm(x[rows], weight_FD.t(), out=out[rows])
        end = rows.stop
    out[end:] = 0
    return out


@_grouped_linear.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@torch.library.custom_op("internevo::grouped_product", mutates_args=())
def _grouped_product(grad: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    out = x.new_empty(ends.shape[0], grad.shape[1], x.shape[1])
    for rows, out_FD in zip(_groups(ends), out, strict=True):
        torch.mm(grad[rows].t(), x[rows], out=out_FD)  # zeros, if there are no rows
    return out


@_grouped_product.register_fake
def _(grad: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(ends.shape[0], grad.shape[1], x.shape[1])


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    x, weight, ends = ctx.saved_tensors
    needs_x, needs_weight, _ = ctx.needs_input_grad
    grad_x = torch.ops.internevo.grouped_linear(grad, weight.transpose(1, 2), ends) if needs_x else None
    return grad_x, torch.ops.internevo.grouped_product(grad, x, ends) if needs_weight else None, None


_grouped_linear.register_autograd(_backward, setup_context=_save)
