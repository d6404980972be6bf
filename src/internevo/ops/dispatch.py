"""Helpers for dispatch modes, which see every operator that runs. Only this file uses PyTorch's private names for them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves, tree_map

__all__ = [
    "PLAIN",
    "FakeTensor",
    "FakeTensorMode",
    "QuickMode",
    "TorchDispatchMode",
    "collective_name",
    "group_ranks",
    "is_watched",
    "local_part",
    "operator_name",
    "synchronize",
    "tensors_in",
    "tree_leaves",
    "tree_map",
    "unset_fake_temporarily",
    "wait",
]


class QuickMode(TorchDispatchMode):
    """A dispatch mode for code that is never compiled, so that the compiler need not be turned off in every call of it."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


def is_watched() -> bool:
    """Whether a dispatch mode is active."""
    return _get_current_dispatch_mode() is not None


PLAIN = frozenset([torch.Tensor, torch.nn.Parameter, FakeTensor])
"""Types of tensors that are no wrappers of others. A fake tensor has a shape and no memory."""


def tensors_in(tree: Any) -> Iterator[torch.Tensor]:
    """Yields the plain tensors in a tree that have memory; of a DTensor, this rank's shard."""
    if isinstance(tree, torch.Tensor):
        tree = local_part(tree)
        if type(tree) is FakeTensor or (type(tree) in PLAIN and not tree.is_meta):  # a fake tensor has to look for its device
            yield tree
    elif isinstance(tree, list | tuple):
        for item in tree:
            yield from tensors_in(item)
    elif isinstance(tree, dict):
        yield from tensors_in(list(tree.values()))


def operator_name(operator: Any) -> str:
    """Returns an operator's name without its overload, as "namespace::name"."""
    return str(operator.name() if hasattr(operator, "name") else operator).split(".")[0]


@cache
def collective_name(operator: Any) -> str | None:
    """Returns the name of an operator in one of the two namespaces of collectives; None for other operators."""
    namespace, _, name = operator_name(operator).partition("::")
    return name if namespace in ("c10d", "_c10d_functional") else None


def group_ranks(arguments: list[Any]) -> list[int]:
    """Returns the ranks of the group that a collective has among its arguments, as a group or as its name."""
    for value in arguments:
        if isinstance(value, str) and value not in ("sum", "avg", "max", "min"):
            return dist.get_process_group_ranks(dist.distributed_c10d._resolve_process_group(value))  # type: ignore[arg-type]
        if _is(value, "ProcessGroup"):
            return dist.get_process_group_ranks(dist.ProcessGroup.unbox(value))
    raise AssertionError("a collective without a group")


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """Returns this rank's shard of a DTensor, and any other tensor as it is, without an operator that a mode would see."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def synchronize(arguments: Any) -> None:
    """Waits for what a GPU still has to do, if there are tensors of one among the arguments."""
    if any(isinstance(leaf, torch.Tensor) and leaf.is_cuda for leaf in tree_leaves(arguments)):
        torch.cuda.synchronize()


def wait(result: Any) -> None:
    """Waits until a collective is complete. ``result`` is what it returned: tensors, or tensors and a ``Work``."""
    for value in tree_leaves(result):
        if _is(value, "Work"):
            work = dist.Work.unbox(value)
            if work is not None:  # NCCL returns none for a collective that runs in the caller's stream
                work.wait()
        elif isinstance(value, torch.Tensor):
            torch.ops._c10d_functional.wait_tensor(value)
            if value.is_cuda:
                torch.cuda.synchronize()


def _is(value: Any, name: str) -> bool:
    return isinstance(value, torch.ScriptObject) and name in str(value._type())
