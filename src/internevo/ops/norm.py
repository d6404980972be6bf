"""RMSNorm (https://arxiv.org/abs/1910.07467), keeping only its input and one number per token for backward.

- CUDA: PyTorch's fused kernel (7 times as fast as several kernels on an H200); not with ``unit_offset``.
- elsewhere: several kernels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, unit_offset: bool = False) -> Tensor:
    """x / sqrt(mean(x^2) + eps), computed in fp32, times the gain.

    Args:
        x: [..., D]. weight: [D].
        unit_offset: the gain is 1 + weight, applied in fp32 before the cast to x's dtype (Gemma's). Otherwise the gain is
            ``weight``, applied after the cast (by the fused kernel: before it).
    """
    if x.is_cuda and not unit_offset:
        return F.rms_norm(x, weight.shape, weight, eps)
    return _RmsNorm.apply(x, weight, eps, unit_offset)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, unit_offset: bool) -> Tensor:  # type: ignore[override, no-untyped-def]
        x32 = x.float()
        scale = torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        ctx.unit_offset = unit_offset
        if unit_offset:
            return (x32 * scale * (1.0 + weight.float())).to(x.dtype)
        return (x32 * scale).to(x.dtype) * weight

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override, no-untyped-def]
        x, weight, scale = ctx.saved_tensors
        unit = x.float() * scale
        grad32 = grad.float()
        grad_weight = (grad32 * unit).flatten(0, -2).sum(0).to(weight.dtype)
        grad_unit = grad32 * (weight.float() + 1.0 if ctx.unit_offset else weight.float())
        # d unit / d x = scale * (I - unit unit^T / D)
        inner = (grad_unit * unit).mean(-1, keepdim=True)
        return ((grad_unit - unit * inner) * scale).to(x.dtype), grad_weight, None, None
