"""Memory of one rank, as it was in a step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..parallel.memory import Memory


class Meter(TorchDispatchMode):
    """Bytes of the tensors made within it, before and behind each forward of a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._storages: dict[int, StorageWeakRef] = {}
        self.before: list[int] = []
        self.behind: list[int] = []
        self._hooks = [
            model.register_forward_pre_hook(lambda *_: self.before.append(self.live()), prepend=True),
            model.register_forward_hook(lambda *_: self.behind.append(self.live())),
        ]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {tensor.untyped_storage()._cdata for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            if storage._cdata not in given:
                self._storages[storage._cdata] = StorageWeakRef(storage)
        return out

    def __exit__(self, *error: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*error)

    def live(self) -> int:
        """Bytes that are held now."""
        time.sleep(0.02)  # a thread of gloo's lets go of a collective's tensors a moment after that is waited for
        self._storages = {key: ref for key, ref in self._storages.items() if not ref.expired()}
        found = (torch.UntypedStorage._new_with_weak_ptr(ref.cdata) for ref in self._storages.values())
        return sum(storage.nbytes() for storage in found if storage is not None)

    def memory(self, masters: int, moments: int, weights: int) -> Memory:
        """As it was. Given are bytes that were there before: of masters, moments, and weights that are not gathered anew."""
        return Memory(masters, moments, weights + self.before[-1], self.behind[-1] - self.before[-1])


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
