"""SwiGLU (https://arxiv.org/abs/2002.05202), keeping only its two inputs for backward."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise; both [..., F]."""
    return _SwiGLU.apply(gate, up)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:  # type: ignore[override, no-untyped-def]
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override, no-untyped-def]
        gate, up = ctx.saved_tensors
        grad_silu = torch.ops.aten.silu_backward(grad * up, gate)
        return grad_silu, grad * F.silu(gate)
