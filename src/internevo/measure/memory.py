"""Measures the memory of one rank in a step."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from ..ops.dispatch import TorchDispatchMode, tree_leaves
from ..parallel.memory import Memory
from ..parallel.orders import Action
from ..parallel.shards import local


class Meter(TorchDispatchMode):
    """Measures the bytes of all tensors that were made in this context and are alive after each pass of a step.

    (``saved_tensors_hooks`` would show only what autograd saves. A recomputed layer keeps more, for example the angles of its
    position encoding or the outputs of its attention.)
    """

    def __init__(self, model: nn.Module, masters: Iterable[nn.Parameter]) -> None:
        super().__init__()
        self.model, self.masters = model, list(masters)
        self.readings: dict[Action, tuple[int, int]] = {}
        """Pass -> bytes of full weights and gradients, and of everything else."""
        self._made: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = {id(tensor.untyped_storage()) for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            if id(storage) not in inputs:
                self._made[id(storage)] = weakref.ref(storage)
        return out

    def read(self, action: Action) -> None:
        """Measures. Must be called after each pass."""
        self._made = {number: reference for number, reference in self._made.items() if reference() is not None}
        everything = _stable(self._read)
        storages = {id(s): s for tensor in self._state() if id(s := local(tensor.detach()).untyped_storage()) in self._made}
        state = sum(storage.nbytes() for storage in storages.values())
        self.readings[action] = state, everything - state

    def memory(self, masters: int, moments: int, weights: int, after: Action) -> Memory:
        """Returns the memory after a pass.

        Args:
            masters, moments: bytes of the master weights and of the moments, which were made before this context.
            weights: bytes of other weights that were made before this context.
        """
        state, activations = self.readings[after]
        return Memory(masters, moments, weights + state, activations, after)

    def _state(self) -> Iterator[Tensor]:
        """Yields weights and gradients. (``fully_shard`` adds up those of another dtype than their weights apart.)"""
        for parameter in (*self.model.parameters(), *self.masters):
            yield from (tensor for tensor in (parameter, parameter.grad) if tensor is not None)
        for module in self.model.modules():
            group = module._get_fsdp_state()._fsdp_param_group if isinstance(module, FSDPModule) else None
            for sharded in group.fsdp_params if group is not None else ():
                if sharded.unsharded_accumulated_grad is not None:
                    yield sharded.unsharded_accumulated_grad

    def _read(self) -> int:
        storages = (reference() for reference in self._made.values())
        return sum(storage.nbytes() for storage in storages if storage is not None)


def _stable(read: Callable[[], int]) -> int:
    """Reads a number until it no longer changes: gloo's thread frees the tensors of a collective a moment after its end."""
    values = [read()]
    while len(values) < 100 and (len(values) < 4 or len(set(values[-4:])) > 1):
        time.sleep(0.001)
        values.append(read())
    return values[-1]


def _tensors(tree: Any) -> Iterator[Tensor]:
    """Yields the plain tensors in a tree that have memory; of a DTensor, this rank's shard."""
    for leaf in tree_leaves(tree):
        leaf = leaf.to_local() if isinstance(leaf, DTensor) else leaf
        if type(leaf) in (Tensor, nn.Parameter) and leaf.device.type != "meta":
            yield leaf


class OfRank(NamedTuple):
    """The memory of a rank."""

    rank: int
    formula: Memory
    measured: Memory


def table(ranks: Sequence[OfRank]) -> list[str]:
    """Formats the measured memory of the first rank as a table, next to that of the formula; and the totals of the others."""
    first, *others = ranks
    lines = [f"{f'memory of rank {first.rank}, MB':28}{'measured':>12}{'by formula':>12}"]
    parts = {**Memory.NAMES, "total": "total"}.items()
    rows = [(name, getattr(first.measured, part), getattr(first.formula, part)) for part, name in parts]
    rows += [(f"total of rank {rank}", measured.total, formula.total) for rank, formula, measured in others]
    return lines + [f"{name:28}{measured / 1e6:>12.3f}{formula / 1e6:>12.3f}" for name, measured, formula in rows]
