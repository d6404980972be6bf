"""Operators on many tensors at once. On a GPU, one kernel computes all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copies each source into its target and converts it to the target's dtype."""
    torch._foreach_copy_(list(targets), list(sources))


def adamw(
    masters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    firsts: Sequence[Tensor],
    seconds: Sequence[Tensor],
    step: Tensor,
    rates: tuple[float, float, float, float, float],
    divisor: Tensor,
    overflow: Tensor,
) -> None:
    """Divides the gradients by ``divisor`` and updates all tensors in place; if ``overflow`` is 1, nothing changes.

    Args:
        step: number of the update, from 1.
        rates: the learning rate, beta1, beta2, epsilon and the weight decay.
    """
    lr, beta1, beta2, eps, decay = rates
    torch._fused_adamw_(
        list(masters), list(gradients), list(firsts), list(seconds), [], [step] * len(masters),
        lr=lr, beta1=beta1, beta2=beta2, weight_decay=decay, eps=eps,
        amsgrad=False, maximize=False, grad_scale=divisor, found_inf=overflow,
    )  # fmt: skip


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """Returns the L2 norm of each tensor, as one vector."""
    return torch.stack(torch._foreach_norm(list(tensors)))
