"""Measures the memory of one rank in a step."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops.dispatch import TorchDispatchMode, local_part, tensors_in
from ..parallel.accumulated import accumulated_gradients
from ..parallel.memory import Memory
from ..parallel.orders import Action


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
        storages = [tensor.untyped_storage() for tensor in tensors_in(out)]
        new = [storage for storage in storages if not self._knows(storage)]
        inputs = {id(tensor.untyped_storage()) for tensor in tensors_in((args, kwargs))} if new else set[int]()
        self._made.update({id(storage): weakref.ref(storage) for storage in new if id(storage) not in inputs})
        return out

    def _knows(self, storage: torch.UntypedStorage) -> bool:
        reference = self._made.get(id(storage))
        return reference is not None and reference() is storage

    @torch.no_grad()
    def read(self, action: Action) -> None:
        """Measures. Must be called after each pass."""
        # ``fully_shard`` pads fake masters again in the first forward pass, because it compares addresses.
        masters = {id(local_part(master).untyped_storage()) for master in self.masters}
        self._made = {n: reference for n, reference in self._made.items() if n not in masters and reference() is not None}
        everything = _stable(self._read)
        storages = {id(s): s for tensor in self._state() if id(s := local_part(tensor).untyped_storage()) in self._made}
        state = sum(storage.nbytes() for storage in storages.values())
        self.readings[action] = state, everything - state

    def memory(self, tensors: Mapping[str, Tensor], copies: Iterable[Tensor], after: Action | None = None) -> Memory:
        """Returns the memory after a pass; None: after the last one that leaves the most.

        Args:
            tensors: the master weights (model/NAME) and moments (optimizer/NAME), which were made before this context.
            copies: the other copies of master weights.
        """
        masters, moments = (
            [local_part(tensor) for name, tensor in tensors.items() if name.startswith(kind)]
            for kind in ("model/", "optimizer/")
        )
        masters += [local_part(copy) for copy in copies]
        storages = {id(tensor.untyped_storage()) for tensor in masters}
        weights = [local_part(weight) for weight in self.model.parameters()]
        made_before = [weight for weight in weights if id(weight.untyped_storage()) not in storages]
        if after is None:
            after = max(reversed(self.readings), key=lambda action: sum(self.readings[action]))
        state, activations = self.readings[after]
        master_bytes, moment_bytes, weight_bytes = (
            sum(tensor.nbytes for tensor in kind) for kind in (masters, moments, made_before)
        )
        return Memory(master_bytes, moment_bytes, weight_bytes + state, activations, after)

    def _state(self) -> Iterator[Tensor]:
        """Yields weights and gradients."""
        yield from (*self.model.parameters(), *self.masters)
        yield from (gradient for _, gradient in gradients_of(self.model, (("", master) for master in self.masters)))

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


def gradients_of(model: nn.Module, masters: Iterable[tuple[str, nn.Parameter]]) -> Iterator[tuple[str, Tensor]]:
    """Yields the gradients of a model's parameters and of master weights, with their names. (``fully_shard`` adds up those of
    another dtype than their weights apart.)"""
    for name, parameter in (*model.named_parameters(), *masters):
        if parameter.grad is not None:
            yield name, parameter.grad
    yield from accumulated_gradients(model)


class OfRank(NamedTuple):
    """The memory of a rank."""

    rank: int
    formula: Memory | None
    """None with adapters."""
    measured: Memory


def table(ranks: Sequence[OfRank]) -> list[str]:
    """Formats the measured memory of the first rank as a table, next to that of the formula; and the totals of the others."""
    first, *others = ranks
    lines = [f"{f'memory of rank {first.rank}, MB':28}{'measured':>12}{'by formula':>12}"]
    rows = [(name, part, first) for part, name in {**Memory.NAMES, "total": "total"}.items()]
    rows += [(f"total of rank {of_rank.rank}", "total", of_rank) for of_rank in others]
    for name, part, (_, formula, measured) in rows:
        stated = f"{getattr(formula, part) / 1e6:.3f}" if formula is not None else "-"
        lines.append(f"{name:28}{getattr(measured, part) / 1e6:>12.3f}{stated:>12}")
    return lines
