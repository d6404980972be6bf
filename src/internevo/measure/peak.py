"""Measures the most memory of one rank at any moment of a step, within passes too."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..ops.dispatch import FakeTensorMode, QuickMode, collective_name, local_part, operator_name, tensors_in


@dataclass(frozen=True)
class Moment:
    """The moment at which most bytes are alive."""

    nbytes: int = 0
    """Of all tensors that were made in the step."""
    operator: str = ""
    """What made the last of these tensors."""
    module: str = ""
    """The innermost module in whose forward pass (or recomputation) it was made; empty: none, as in a backward pass."""
    made: int = 0
    """The bytes of that tensor."""


class Peak(QuickMode):
    """Adds up the bytes of all tensors that are made in this context, and takes off those that are freed.

    What operators need inside, and never return, is not seen.
    """

    def __init__(self, model: nn.Module, masters: Iterable[nn.Parameter], fake: FakeTensorMode | None = None) -> None:
        """
        Args:
            masters: weights whose memory counts as that of before the step, even if they are made again. (``fully_shard`` pads
                fake ones a second time.)
            fake: the mode of the tensors, if they have no memory. (DTensors compute shapes with tensors of other such modes.)
        """
        super().__init__()
        self.moments = [Moment()]
        """The moment of most bytes in each pass, and last, in what comes after them."""
        self._fake = fake
        self._model, self._modules = model, list[str]()
        """The modules that are in their forward pass now, from the outermost one."""
        self._masters, self._now, self._hooks = list(masters), 0, list[RemovableHandle]()
        self._alive: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}
        self._resized: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        """Storages that something is written to: ``fully_shard`` frees and allocates their memory without an operator."""

    def after_pass(self, action: object) -> None:
        """Must be called after each pass."""
        self.moments.append(Moment())

    def __enter__(self) -> Self:
        for name, module in self._model.named_modules():
            self._hooks += [
                module.register_forward_pre_hook(partial(self._begins, name)),
                module.register_forward_hook(self._ends, always_call=True),
            ]
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*error)

    def _begins(self, name: str, *_: object) -> None:
        self._modules.append(name)

    def _ends(self, *_: object) -> None:
        self._modules.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        written = kwargs["out"] if kwargs and "out" in kwargs else args[0] if func is torch.ops.aten.copy_.default else None
        if written is not None:
            for tensor in self._tensors(written):
                storage = tensor.untyped_storage()
                if id(storage) in self._alive:
                    self._resized[id(storage)] = weakref.ref(storage)
                    self._count(storage)
        if collective_name(func) == "wait_tensor":  # without memory, it makes another tensor instead of returning its argument
            for tensor in self._tensors(args):
                self._freed(id(tensor.untyped_storage()))(None)
        inputs: set[int] | None = None
        for tensor in self._tensors(out):
            storage = tensor.untyped_storage()
            if id(storage) in self._alive:
                continue
            inputs = {id(given.untyped_storage()) for given in self._tensors((args, kwargs))} if inputs is None else inputs
            if id(storage) not in inputs or collective_name(func) == "wait_tensor":
                self._count(storage)
        if self._now > self.moments[-1].nbytes:
            self._correct()
            if self._now > self.moments[-1].nbytes:
                made = sum(tensor.nbytes for tensor in self._tensors(out))
                self.moments[-1] = Moment(self._now, operator_name(func), self._modules[-1] if self._modules else "", made)
        return out

    def _tensors(self, tree: object) -> Iterator[torch.Tensor]:
        return (tensor for tensor in tensors_in(tree) if getattr(tensor, "fake_mode", None) is self._fake)

    def _count(self, storage: torch.UntypedStorage) -> None:
        number, nbytes = id(storage), storage.nbytes()
        if number in self._alive:
            self._now -= self._alive[number][1]
            self._alive[number] = self._alive[number][0], nbytes
        else:
            self._alive[number] = weakref.ref(storage, self._freed(number)), nbytes
        self._now += nbytes

    def _freed(self, number: int) -> Callable[[object], None]:
        def freed(_: object) -> None:
            self._resized.pop(number, None)
            if number in self._alive:
                self._now -= self._alive.pop(number)[1]

        return freed

    def _correct(self) -> None:
        """Takes off what was freed without an operator, and the masters."""
        for reference in list(self._resized.values()):
            if (storage := reference()) is not None:
                self._count(storage)
        for master in self._masters:
            _, nbytes = self._alive.pop(id(local_part(master).untyped_storage()), (None, 0))
            self._now -= nbytes
