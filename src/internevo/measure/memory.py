"""Measures the memory of one rank in a step."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..ops.dispatch import TorchDispatchMode, tree_leaves
from ..parallel.memory import Memory
from ..parallel.shards import local


class Meter(TorchDispatchMode):
    """Measures the bytes of all tensors that are made in this context and alive before and after each forward pass of a model.

    (``saved_tensors_hooks`` would show only what autograd saves. A recomputed layer keeps more, for example the angles of its
    position encoding or the outputs of its attention.)
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.before: list[tuple[int, int]] = []
        """Before each forward pass: bytes of full weights that were made in this context, and of everything else."""
        self.after: list[tuple[int, int]] = []
        """The same after each forward pass."""
        self._made: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._hooks = [
            model.register_forward_pre_hook(lambda *_: self.before.append(self._alive()), prepend=True),
            model.register_forward_hook(lambda *_: self.after.append(self._alive())),
        ]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = {id(tensor.untyped_storage()) for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            if id(storage) not in inputs:
                self._made[id(storage)] = weakref.ref(storage)
        return out

    def __exit__(self, *error: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*error)

    def memory(self, masters: int, moments: int, weights: int) -> Memory:
        """Returns the memory at the last forward pass.

        Args:
            masters, moments: bytes of the master weights and of the moments, which were made before this context.
            weights: bytes of other weights that were made before this context.
        """
        (_, others_before), (full_weights, others_after) = self.before[-1], self.after[-1]
        # Full weights that the forward pass has gathered do not count as activations. (Other bytes before it are gradients.)
        return Memory(masters, moments, weights + full_weights + others_before, others_after - others_before)

    def _alive(self) -> tuple[int, int]:
        self._made = {number: reference for number, reference in self._made.items() if reference() is not None}
        everything = _stable(self._read)
        storages = {id(s): s for p in self.model.parameters() if id(s := local(p.detach()).untyped_storage()) in self._made}
        full_weights = sum(storage.nbytes() for storage in storages.values())
        return full_weights, everything - full_weights

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


def table(formula: Memory | None, measured: Memory) -> list[str]:
    """Formats the measured memory as a table, next to that of the formula, if it is known."""
    lines = [f"{'memory of rank 0, MB':28}{'measured':>12}{'by formula':>12}"]
    for field, name in {**Memory.NAMES, "total": "total"}.items():
        by_formula = f"{getattr(formula, field) / 1e6:>12.3f}" if formula else ""
        lines.append(f"{name:28}{getattr(measured, field) / 1e6:>12.3f}{by_formula}")
    return lines
