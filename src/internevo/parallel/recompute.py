"""Activation recomputation (https://arxiv.org/abs/1604.06174): what a layer keeps for backward, it computes again there.

| ``model.checkpoint`` | recomputed                          | kept                              |
|----------------------|-------------------------------------|-----------------------------------|
| a share, or True     | the first ``int(share * n)`` layers | each one's input                  |
| "attention"          | attention of every layer            | its input, and what the MLP keeps |

"attention" is selective recomputation (https://arxiv.org/abs/2205.05198, section 5) of the attention block. With
``selective_checkpoint`` the outputs of the attention kernel are kept as well, and that kernel does not run again.
Results do not change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    _CachedTorchDispatchMode,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from ..models.layers import DecoderLayer

ATTENTION = (
    "internevo::document_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "torch_attn::_varlen_attn",
)
"""Kernels of attention, on every device."""


def recompute(
    layers: list[DecoderLayer], share: float | Literal["attention"], keep_attention: bool, compiled: bool = False
) -> None:
    """Makes ``layers`` recompute, in place.

    Args:
        share: of the layers, or "attention".
        keep_attention: whether outputs of the attention kernel are kept.
        compiled: compile what is recomputed, for layers that cannot be compiled as a whole. (Not where attention is kept: its
            kernel must be seen.)
    """
    chosen = [layer.attn for layer in layers] if share == "attention" else layers[: int(len(layers) * share)]
    for module in chosen:
        forward = torch.compile(module.forward) if compiled and not keep_attention else module.forward
        module.forward = _recomputed(forward, keep_attention)  # type: ignore[method-assign]


def _recomputed(forward: Callable[..., Any], keep_attention: bool) -> Callable[..., Any]:
    """A function of its own, which a compiler can trace (it cannot trace functools.partial)."""
    more: dict[str, Any] = {"context_fn": _contexts} if keep_attention else {}

    def run(*inputs: Any) -> Any:
        # Nothing in a layer is random, so the generators' states need not be kept.
        return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False, **more)

    return run


def _contexts() -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """Around the first pass, and around the second."""
    first, second = create_selective_checkpoint_contexts(_policy)
    return first, _Kept(_policy, second.storage)


class _Kept(_CachedTorchDispatchMode):
    """Looks for what was kept, and for nothing else: PyTorch's own insists on the same operators in both passes, but a
    strategy may have fetched a layer's weights during another layer's first pass."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _is_attention(func):
            return super().__torch_dispatch__(func, types, args, kwargs)
        return func(*args, **(kwargs or {}))


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Which results are kept."""
    return CheckpointPolicy.MUST_SAVE if _is_attention(operator) else CheckpointPolicy.PREFER_RECOMPUTE


def _is_attention(operator: Any) -> bool:
    name = operator.name() if isinstance(operator, torch._ops.OpOverload) else str(operator)
    return name.split(".")[0] in ATTENTION
