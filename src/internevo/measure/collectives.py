"""Collectives, counted: those that a step should have, by the strategies' formulas, and those that it had.

Bytes are those of the full tensor X of a collective (for all-to-all: of this rank's input). On the wire a rank moves
X * (n - 1) / n for all-gather, reduce-scatter and all-to-all, and twice that for all-reduce.
"""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..parallel.layout import Layout
from ..parallel.strategy import Collectives

KINDS = {
    "all_gather_into_tensor": "all-gather", "_allgather_base_": "all-gather", "all_gather_into_tensor_coalesced": "all-gather",
    "reduce_scatter_tensor": "reduce-scatter", "_reduce_scatter_base_": "reduce-scatter", "reduce_scatter_": "reduce-scatter",
    "reduce_scatter_tensor_coalesced": "reduce-scatter", "all_reduce": "all-reduce", "allreduce_": "all-reduce",
    "all_to_all_single": "all-to-all", "alltoall_base_": "all-to-all",
}  # fmt: skip


class Counter(TorchDispatchMode):
    """Counts the collectives that are called within it, over groups of more than one rank, and times them: each is waited for
    where it is called, so that its time is its own (slower ranks included)."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout
        self.found: dict[tuple[str, str], Collectives] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kind = KINDS.get(func._schema.name.split("::")[1]) if func.namespace in ("c10d", "_c10d_functional") else None
        if kind is None:
            return func(*args, **(kwargs or {}))
        ranks = dist.get_process_group_ranks(_group([*args, *(kwargs or {}).values()]))
        begin = time.perf_counter()
        out = func(*args, **(kwargs or {}))
        _finish(out)
        if len(ranks) > 1:
            axis = self.layout.axis_of(kind, ranks)
            row = self.found.setdefault((kind, axis), Collectives(kind, axis))
            row.count += 1
            row.nbytes += _input_bytes(func, args) * (len(ranks) if kind == "all-gather" else 1)
            row.seconds += time.perf_counter() - begin
        return out

    def rows(self) -> list[Collectives]:
        """What was found, sorted."""
        return [self.found[key] for key in sorted(self.found)]


def _group(values: list[Any]) -> dist.ProcessGroup:
    for value in values:
        if isinstance(value, str) and value not in ("sum", "avg", "max", "min"):
            return dist.distributed_c10d._resolve_process_group(value)  # type: ignore[arg-type]
        if isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value._type()):
            return dist.ProcessGroup.unbox(value)
    raise AssertionError("a collective without a group")


def _finish(out: Any) -> None:
    """Waits for what a collective has returned: tensors that are to come, or tensors and their work."""
    for value in tree_leaves(out):
        if isinstance(value, torch.ScriptObject) and "Work" in str(value._type()):
            work = dist.Work.unbox(value)
            if work is not None:  # NCCL has none for what goes on in the caller's stream
                work.wait()
        elif isinstance(value, Tensor):
            torch.ops._c10d_functional.wait_tensor(value)
            if value.is_cuda:
                torch.cuda.synchronize()


def _input_bytes(func: Any, args: Any) -> int:
    """Bytes of this rank's input."""
    behind = func._schema.name.split("::")[1] in ("_allgather_base_", "_reduce_scatter_base_", "reduce_scatter_")
    return sum(tensor.numel() * tensor.element_size() for tensor in tree_leaves(args[1] if behind else args[0]))


def table(rows: list[Collectives], layout: Layout, formula: list[Collectives] | None) -> list[str]:
    """Lines for people; beside what was counted stands what the strategies state, where it differs."""
    stated = {(row.kind, row.axis): row for row in formula or []}
    groups = layout.groups()
    lines = [f"{'collective':16}{'group':>12}{'ranks':>7}{'count':>8}{'MB':>12}{'MB on the wire':>16}{'ms':>10}"]
    for row in rows:
        ranks = len(groups[row.axis][0]) if row.axis in groups else layout.world
        line = f"{row.kind:16}{row.axis:>12}{ranks:>7}{row.count:>8}{row.nbytes / 1e6:>12.3f}{row.wire(ranks) / 1e6:>16.3f}"
        wanted = stated.get((row.kind, row.axis), Collectives(row.kind, row.axis))
        differs = formula is not None and (wanted.count, wanted.nbytes) != (row.count, row.nbytes)
        note = f"   by formula {wanted.count}, {wanted.nbytes / 1e6:.3f} MB" if differs else ""
        lines.append(f"{line}{row.seconds * 1e3:>10.1f}{note}")
    return lines
