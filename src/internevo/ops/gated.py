"""Gated activations (https://arxiv.org/abs/2002.05202) that keep only their two inputs for the backward pass."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def gated(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """Returns activation(gate) * up, computed elementwise; both are [..., F].

    Args:
        activation: "silu", or "gelu_tanh" (the tanh approximation of GELU, https://arxiv.org/abs/1606.08415).
    """
    return _Gated.apply(gate, up, activation)


def _act(x: Tensor, activation: str) -> Tensor:
    return F.silu(x) if activation == "silu" else F.gelu(x, approximate="tanh")


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, activation: str) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return _act(gate, activation).mul_(up)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        gate, up = ctx.saved_tensors
        if ctx.activation == "silu":
            grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
        else:
            grad_gate = torch.ops.aten.gelu_backward(grad * up, gate, approximate="tanh")
        return grad_gate, _act(gate, ctx.activation).mul_(grad), None
