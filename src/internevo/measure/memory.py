"""Memory of one rank, as it was in a step."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.dispatch import TorchDispatchMode, tree_leaves
from ..parallel.memory import Memory


class Meter(TorchDispatchMode):
    """Bytes of the tensors made within it that are alive before and after each forward pass of a model.

    (What autograd saves, ``saved_tensors_hooks`` would tell; but not what a recomputed layer holds besides, such as angles, or
    the outputs of its attention.)
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.before: list[int] = []
        self.after: list[int] = []
        self._made: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._hooks = [
            model.register_forward_pre_hook(lambda *_: self.before.append(self._alive()), prepend=True),
            model.register_forward_hook(lambda *_: self.after.append(self._alive())),
        ]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {id(tensor.untyped_storage()) for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            if id(storage) not in given:
                self._made[id(storage)] = weakref.ref(storage)
        return out

    def __exit__(self, *error: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*error)

    def memory(self, masters: int, moments: int, weights: int) -> Memory:
        """Of the last forward pass. Given are bytes that were there before: of masters, moments, and weights that are never
        gathered."""
        return Memory(masters, moments, weights + self.before[-1], self.after[-1] - self.before[-1])

    def _alive(self) -> int:
        self._made = {number: reference for number, reference in self._made.items() if reference() is not None}
        return _settled(self._read)

    def _read(self) -> int:
        storages = (reference() for reference in self._made.values())
        return sum(storage.nbytes() for storage in storages if storage is not None)


def _settled(read: Callable[[], int]) -> int:
    """A number once it stays: gloo's thread lets go of a collective's tensors a moment after that is waited for."""
    values = [read()]
    while len(values) < 100 and (len(values) < 4 or len(set(values[-4:])) > 1):
        time.sleep(0.001)
        values.append(read())
    return values[-1]


def _tensors(tree: Any) -> Iterator[Tensor]:
    """Plain tensors of a tree that have memory."""
    for leaf in tree_leaves(tree):
        if type(leaf) in (Tensor, nn.Parameter) and leaf.device.type != "meta":
            yield leaf


def table(formula: Memory | None, found: Memory) -> list[str]:
    """Lines for people."""
    lines = [f"{'memory of rank 0, MB':28}{'measured':>12}{'by formula':>12}"]
    for field, name in {**Memory.NAMES, "total": "total"}.items():
        by_formula = f"{getattr(formula, field) / 1e6:>12.3f}" if formula else ""
        lines.append(f"{name:28}{getattr(found, field) / 1e6:>12.3f}{by_formula}")
    return lines
