"""Dispatch modes: seeing every operator that runs. PyTorch's names for them are private, and stand here alone."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["TorchDispatchMode", "collective_name", "group_ranks", "operator_name", "tree_leaves", "tree_map", "wait"]


def operator_name(operator: Any) -> str:
    """ "namespace::name", without the overload."""
    return str(operator.name() if hasattr(operator, "name") else operator).split(".")[0]


def collective_name(operator: Any) -> str | None:
    """Name of a collective, or of anything else in its two namespaces; None of other operators."""
    namespace, _, name = operator_name(operator).partition("::")
    return name if namespace in ("c10d", "_c10d_functional") else None


def group_ranks(arguments: list[Any]) -> list[int]:
    """Ranks of the group among a collective's arguments: the group itself, or its name."""
    for value in arguments:
        if isinstance(value, str) and value not in ("sum", "avg", "max", "min"):
            return dist.get_process_group_ranks(dist.distributed_c10d._resolve_process_group(value))  # type: ignore[arg-type]
        if _is(value, "ProcessGroup"):
            return dist.get_process_group_ranks(dist.ProcessGroup.unbox(value))
    raise AssertionError("a collective without a group")


def wait(result: Any) -> None:
    """Waits for what a collective has returned: tensors that are to come, or tensors and their work."""
    for value in tree_leaves(result):
        if _is(value, "Work"):
            work = dist.Work.unbox(value)
            if work is not None:  # NCCL has none for what goes on in the caller's stream
                work.wait()
        elif isinstance(value, torch.Tensor):
            torch.ops._c10d_functional.wait_tensor(value)
            if value.is_cuda:
                torch.cuda.synchronize()


def _is(value: Any, name: str) -> bool:
    return isinstance(value, torch.ScriptObject) and name in str(value._type())
