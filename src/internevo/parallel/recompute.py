"""Activation recomputation (https://arxiv.org/abs/1604.06174): the backward pass computes activations again instead of keeping
them.

| ``model.checkpoint`` | recomputed                          | kept                              |
|----------------------|-------------------------------------|-----------------------------------|
| a share, or True     | the first ``int(share * n)`` layers | the input of each                 |
| "attention"          | attention of every layer            | its input, and what the MLP keeps |

"attention" is selective recomputation (https://arxiv.org/abs/2205.05198, section 5) of the attention block. With
``selective_checkpoint``, the outputs of the attention kernel are kept too, and the kernel does not run again.
Recomputation does not change any result.
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
"""Names of the attention kernels on all devices."""


class RecomputationState:
    """Whether a module is being recomputed. Modules with recomputation have it as ``module.recomputation``."""

    def __init__(self) -> None:
        self.recomputing = False
        """Whether the second forward pass, which is part of the backward pass, is running."""


def recompute(
    layers: list[DecoderLayer],
    share: float | Literal["attention"],
    keep_attention: bool,
    compiled: Literal["no", "inside", "around"],
) -> None:
    """Adds recomputation to ``layers``, in place.

    Args:
        share: the share of the layers that is recomputed, or "attention" for the attention of all layers.
        keep_attention: whether the outputs of the attention kernel are kept.
        compiled: "no": nothing is compiled; "around": the caller compiles whole layers afterwards, with their recomputation;
            "inside": this function compiles what is recomputed (except with ``keep_attention``: in compiled code the attention
            kernel cannot be recognised).
    """
    chosen = [layer.attn for layer in layers] if share == "attention" else layers[: int(len(layers) * share)]
    for module in chosen:
        forward = torch.compile(module.forward) if compiled == "inside" and not keep_attention else module.forward
        if compiled == "around":
            contexts = _selective if keep_attention else None
        else:
            state = RecomputationState()
            module.recomputation = state  # type: ignore[assignment]
            contexts = partial(_contexts, state, keep_attention)
        module.forward = _checkpointed(forward, contexts)  # type: ignore[method-assign]


def is_recomputing(*modules: nn.Module) -> bool:
    """Whether the second forward pass of one of these modules is running."""
    states = (getattr(module, "recomputation", None) for module in modules)
    return any(isinstance(state, RecomputationState) and state.recomputing for state in states)


def _checkpointed(forward: Callable[..., Any], contexts: Callable[[], Any] | None) -> Callable[..., Any]:
    """Returns ``forward`` with recomputation. It is a function because the compiler cannot trace ``functools.partial``."""
    options: dict[str, Any] = {"context_fn": contexts} if contexts is not None else {}

    def run(*inputs: Any) -> Any:
        # Nothing in a layer is random, so the states of the random number generators need not be kept.
        return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False, **options)

    return run


def _contexts(state: RecomputationState, keep: bool) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Returns the contexts of the first and of the second forward pass."""
    outputs: deque[Any] = deque()
    return _KeepAttention(outputs) if keep else nullcontext(), _second_pass(state, outputs, keep)


@contextmanager
def _second_pass(state: RecomputationState, outputs: deque[Any], keep: bool) -> Iterator[None]:
    with ExitStack() as stack:
        if keep:
            stack.enter_context(_ReturnKept(outputs))
        state.recomputing = True
        try:
            yield
        finally:
            state.recomputing = False


class _KeepAttention(TorchDispatchMode):
    """In the first forward pass: keeps what the attention kernel returns."""

    def __init__(self, outputs: deque[Any]) -> None:
        super().__init__()
        self.outputs = outputs

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if operator_name(func) in ATTENTION:
            self.outputs.append(tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, out))
        return out


class _ReturnKept(TorchDispatchMode):
    """In the second forward pass: returns what was kept, and does not run the attention kernel.

    (PyTorch's own mode demands the same operators in both passes. But in the first pass, a strategy may prefetch the weights of
    another layer.)
    """

    def __init__(self, outputs: deque[Any]) -> None:
        super().__init__()
        self.outputs = outputs

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator_name(func) in ATTENTION:
            return self.outputs.popleft()
        return func(*args, **(kwargs or {}))


def _selective() -> Any:
    """Returns the contexts for layers that are compiled with their recomputation, in a form that the compiler knows."""
    return create_selective_checkpoint_contexts(_policy)


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Decides which results are kept: those of the attention kernel."""
    return CheckpointPolicy.MUST_SAVE if operator_name(operator) in ATTENTION else CheckpointPolicy.PREFER_RECOMPUTE
