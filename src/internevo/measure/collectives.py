"""Counts and times the collectives of a step."""

from __future__ import annotations

import time
from functools import cache
from typing import Any

from torch import Tensor

from ..ops.dispatch import TorchDispatchMode, collective_name, group_ranks, synchronize, tree_leaves, wait
from ..parallel.layout import Layout
from ..parallel.strategy import Collectives, added_up

KINDS = {
    "all_gather_into_tensor": "all-gather", "_allgather_base_": "all-gather", "all_gather_into_tensor_coalesced": "all-gather",
    "reduce_scatter_tensor": "reduce-scatter", "_reduce_scatter_base_": "reduce-scatter", "reduce_scatter_": "reduce-scatter",
    "reduce_scatter_tensor_coalesced": "reduce-scatter", "all_reduce": "all-reduce", "allreduce_": "all-reduce",
    "all_to_all_single": "all-to-all", "alltoall_base_": "all-to-all", "send": "send",
}  # fmt: skip
"""Name of PyTorch's operator -> kind of collective."""
OUTPUT_FIRST = ("_allgather_base_", "_reduce_scatter_base_", "reduce_scatter_")
"""Operators whose first argument is the output, and the second the input."""


class Counter(TorchDispatchMode):
    """Counts and times the collectives over more than one rank that are called in this context.

    It waits for each collective where it is called, so nothing overlaps with it. The time includes waiting for slower ranks.
    Messages of a pipeline are not waited for, because their receiver may be waiting for this rank.
    """

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout
        self.calls: list[Collectives] = []
        """Each collective, in their order."""
        self._axis_of = cache(lambda kind, ranks: layout.axis_of(kind, list(ranks)))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = collective_name(func)
        kind = KINDS.get(name) if name is not None else None
        if name is None or kind is None:
            return func(*args, **(kwargs or {}))
        ranks = group_ranks([*args, *(kwargs or {}).values()])
        synchronize(args)
        begin = time.perf_counter()
        out = func(*args, **(kwargs or {}))
        if kind != "send":
            wait(out)
        if len(ranks) > 1:
            axis = self._axis_of(kind, tuple(ranks))
            nbytes = _nbytes(args[1] if name in OUTPUT_FIRST else args[0]) * (len(ranks) if kind == "all-gather" else 1)
            self.calls.append(Collectives(kind, axis, 1, nbytes, time.perf_counter() - begin))
        return out

    def rows(self) -> list[Collectives]:
        """Returns what was counted, added up and sorted by kind and axis."""
        return added_up(self.calls)


def _nbytes(tensors: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(tensors) if isinstance(leaf, Tensor))


def table(rows: list[Collectives], layout: Layout, formula: list[Collectives] | None) -> list[str]:
    """Formats the measured collectives as a table.

    Args:
        rows: what was counted.
        formula: what the strategies state, if it is known. A line says so where a count or its bytes differ from it.
    """
    stated = {(row.kind, row.axis): row for row in formula or []}
    sizes = layout.sizes()
    lines = [f"{'collective':16}{'group':>12}{'ranks':>7}{'count':>8}{'MB':>12}{'MB on the wire':>16}{'ms':>10}"]
    for row in rows:
        ranks = sizes.get(row.axis, layout.world)
        line = f"{row.kind:16}{row.axis:>12}{ranks:>7}{row.count:>8}{row.nbytes / 1e6:>12.3f}{row.wire(ranks) / 1e6:>16.3f}"
        expected = stated.get((row.kind, row.axis), Collectives(row.kind, row.axis))
        differs = formula is not None and (expected.count, expected.nbytes) != (row.count, row.nbytes)
        note = f"   by formula {expected.count}, {expected.nbytes / 1e6:.3f} MB" if differs else ""
        lines.append(f"{line}{row.seconds * 1e3:>10.1f}{note}")
    return lines
