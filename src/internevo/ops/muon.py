"""Muon (https://kellerjordan.github.io/posts/muon/): the update of a matrix is its momentum, made orthogonal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the polynomial that an iteration applies to the singular values, from Muon's author: many iterations would not converge,
but five bring all but the smallest singular values between 0.7 and 1.2."""
EPS = 1e-7
"""Smallest norm by which a matrix is divided."""

Scale = Literal["match_rms_adamw", "original"]


def orthogonalized(x: Tensor, steps: int) -> Tensor:
    """Returns the matrix with singular values near 1 and the singular vectors of another one (Newton-Schulz iterations).

    Args:
        x: [..., rows, columns]; the iterations are computed in its dtype.
        steps: number of iterations.
    """
    a, b, c = COEFFICIENTS
    tall = x.shape[-2] > x.shape[-1]
    y = (x.mT if tall else x).reshape(-1, *(x.shape[:-3:-1] if tall else x.shape[-2:]))
    y = y / y.norm(dim=(-2, -1), keepdim=True).clamp(min=EPS)  # so that no singular value is larger than 1
    for _ in range(steps):
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return (y.mT if tall else y).reshape(x.shape)


def scale_of(shape: Sequence[int], scale: Scale) -> float:
    """Returns the number by which the learning rate of a matrix [..., rows, columns] is multiplied.

    ``match_rms_adamw`` makes an update as large as AdamW's usually is, so that learning rate and weight decay are the same
    (https://arxiv.org/abs/2502.16982, section 2.2).
    """
    rows, columns = shape[-2:]
    return 0.2 * math.sqrt(max(rows, columns)) if scale == "match_rms_adamw" else math.sqrt(max(1.0, rows / columns))


def direction(gradient: Tensor, momentum: Tensor, beta: float, nesterov: bool, factor: Tensor, finite: Tensor) -> Tensor:
    """Updates the momentum in place, and returns what is to be made orthogonal.

    Args:
        gradient, momentum: of the same shape, in fp32.
        beta: decay rate of the momentum.
        factor: the number by which the gradient is multiplied first; a scalar on the same device.
        finite: whether the momentum changes; a scalar (bool) on the same device.
    """
    gradient = torch.where(finite, gradient * factor, momentum)
    momentum.lerp_(gradient, 1 - beta)
    return gradient.lerp(momentum, beta) if nesterov else momentum


def apply(master: Tensor, update: Tensor, rate: float, kept: float, finite: Tensor) -> None:
    """Updates a weight in place: weight * ``kept`` - ``rate`` * update, where ``finite`` is true."""
    master.copy_(torch.where(finite, master * kept - rate * update.to(master.dtype), master))
