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
from functools import partial
from typing import Any, Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

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


def recompute(layers: list[DecoderLayer], share: float | Literal["attention"], keep_attention: bool) -> None:
    """Makes ``layers`` recompute, in place.

    Args:
        share: of the layers, or "attention".
        keep_attention: whether outputs of the attention kernel are kept.
    """
    chosen = [layer.attn for layer in layers] if share == "attention" else layers[: int(len(layers) * share)]
    for module in chosen:
        module.forward = _recomputed(module.forward, keep_attention)  # type: ignore[method-assign]


def _recomputed(forward: Callable[..., Any], keep_attention: bool) -> Callable[..., Any]:
    """A function of its own, which a compiler can trace (it cannot trace functools.partial)."""
    more: dict[str, Any] = {}
    if keep_attention:
        more["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)

    def run(*inputs: Any) -> Any:
        # Nothing in a layer is random, so the generators' states need not be kept.
        return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False, **more)

    return run


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Which results are kept."""
    name = operator.name() if isinstance(operator, torch._ops.OpOverload) else str(operator)
    return CheckpointPolicy.MUST_SAVE if name.split(".")[0] in ATTENTION else CheckpointPolicy.PREFER_RECOMPUTE
