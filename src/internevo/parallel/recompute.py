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

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ..models.layers import DecoderLayer
from ..ops.dispatch import TorchDispatchMode, operator_name, tree_map

ATTENTION = (
    "internevo::document_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "torch_attn::_varlen_attn",
)
"""Kernels of attention, on every device."""


class Recomputed:
    """Where the recomputation of a module is; ``module.recomputed`` of those that are recomputed."""

    def __init__(self) -> None:
        self.again = False
        """Its second forward pass is running."""


def recompute(
    layers: list[DecoderLayer],
    share: float | Literal["attention"],
    keep_attention: bool,
    compiled: Literal["no", "inside", "around"],
) -> None:
    """Makes ``layers`` recompute, in place.

    Args:
        share: of the layers, or "attention".
        keep_attention: whether outputs of the attention kernel are kept.
        compiled: "around": whole layers are, with their recomputation, later; "inside": what is recomputed is, here (not where
            attention is kept: its kernel must be seen).
    """
    chosen = [layer.attn for layer in layers] if share == "attention" else layers[: int(len(layers) * share)]
    for module in chosen:
        forward = torch.compile(module.forward) if compiled == "inside" and not keep_attention else module.forward
        if compiled == "around":
            contexts = _selective if keep_attention else None
        else:
            recomputed = Recomputed()
            module.recomputed = recomputed  # type: ignore[assignment]
            contexts = partial(_passes, recomputed, keep_attention)
        module.forward = _checkpointed(forward, contexts)  # type: ignore[method-assign]


def is_again(*modules: nn.Module) -> bool:
    """Whether one of these is in the second forward pass of its recomputation."""
    return any(isinstance(found := getattr(module, "recomputed", None), Recomputed) and found.again for module in modules)


def _checkpointed(forward: Callable[..., Any], contexts: Callable[[], Any] | None) -> Callable[..., Any]:
    """A function of its own, which a compiler can trace (it cannot trace functools.partial)."""
    more: dict[str, Any] = {"context_fn": contexts} if contexts is not None else {}

    def run(*inputs: Any) -> Any:
        # Nothing in a layer is random, so the generators' states need not be kept.
        return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False, **more)

    return run


def _passes(recomputed: Recomputed, keep: bool) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Around the first pass, and around the second."""
    outputs: deque[Any] = deque()
    return _Keep(outputs) if keep else nullcontext(), _again(recomputed, outputs, keep)


@contextmanager
def _again(recomputed: Recomputed, outputs: deque[Any], keep: bool) -> Iterator[None]:
    with ExitStack() as stack:
        if keep:
            stack.enter_context(_GiveBack(outputs))
        recomputed.again = True
        try:
            yield
        finally:
            recomputed.again = False


class _Keep(TorchDispatchMode):
    """In the first pass: keeps what the attention kernel returns."""

    def __init__(self, outputs: deque[Any]) -> None:
        super().__init__()
        self.outputs = outputs

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if operator_name(func) in ATTENTION:
            self.outputs.append(tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, out))
        return out


class _GiveBack(TorchDispatchMode):
    """In the second pass: gives it back. (PyTorch's own mode insists on the same operators in both passes, but a strategy may
    have fetched a layer's weights during another layer's first pass.)"""

    def __init__(self, outputs: deque[Any]) -> None:
        super().__init__()
        self.outputs = outputs

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator_name(func) in ATTENTION:
            return self.outputs.popleft()
        return func(*args, **(kwargs or {}))


def _selective() -> Any:
    """The same for layers that are compiled with their recomputation, in the form that the compiler knows."""
    return create_selective_checkpoint_contexts(_policy)


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Which results are kept."""
    return CheckpointPolicy.MUST_SAVE if operator_name(operator) in ATTENTION else CheckpointPolicy.PREFER_RECOMPUTE
