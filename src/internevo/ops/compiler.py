"""Hints for ``torch.compile``. A run that compiles nothing does not import the compiler, which takes a second."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

not_compiled = _disable_dynamo
"""Decorator of functions that compiled code calls as they are: ``torch.compiler.disable``, which imports the compiler."""


def running_uncompiled() -> AbstractContextManager[object]:
    """A context in which compiled functions run as they are written. A dispatch mode needs it, since it cannot see
    what compiled code does."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def mark_dynamic(tensor: Tensor, dim: int) -> None:
    """Tells the compiler that a dimension's size changes from step to step, so that it does not compile again for each size."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.maybe_mark_dynamic(tensor, dim)


def runs_uncompiled() -> bool:
    """Whether ``torch.compile`` has no effect, or is not worth it.

    Before anything has imported the compiler: if no gradients are computed (``torch.is_grad_enabled``). After that: in
    ``running_uncompiled``, wherever it was entered; ``torch.compiler`` sets this stance and has no function that tells it.
    """
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    return not torch.is_grad_enabled() if dynamo is None else dynamo._stance.stance == "force_eager"
