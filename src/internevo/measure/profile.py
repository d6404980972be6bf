"""Where the memory of one rank goes in a step: every allocation with its size, its kind, and the module that it belongs to.

A dispatch mode sees each operator's results, and a weak reference of each storage tells when it is freed. What a storage was
for is known in the end; the first of these that holds counts:

| kind            | is                                                                                                  |
|-----------------|-----------------------------------------------------------------------------------------------------|
| masters         | a master weight                                                                                     |
| moments         | a moment of AdamW                                                                                   |
| weights         | a weight with which the model computes, if that is not its master; also gathered ones               |
| gradients       | a gradient of a weight                                                                              |
| activations     | saved for the backward pass (``saved_tensors_hooks``), or by a recomputation in a backward pass     |
| communication   | sent or received by a collective or a message, or a buffer for it                                   |
| activations     | alive after the pass that made it, though autograd has not saved it                                 |
| temporary       | everything else                                                                                     |
| other           | allocated before the step, and none of these (on a GPU)                                             |

A tensor in a forward pass belongs to the module whose ``forward`` runs; a saved one to the module that has saved it first; one
in a backward pass to the module whose saved tensors autograd has used last; weights, gradients and moments to the module that
has the parameter. Storages are counted once, however many tensors are views of them.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ..ops.dispatch import TorchDispatchMode, collective_name, operator_name, tensors_in
from ..parallel.orders import FORWARD, Action
from .memory import gradients_of

CUDA_BLOCK = 512
"""Bytes. PyTorch's allocator for GPUs rounds up to a multiple of this."""


@dataclass(slots=True)
class Block:
    """A storage."""

    size: int
    """Bytes, now."""
    path: str
    """The module."""
    phase: int
    """Number of the phase in which it was made."""
    operator: str = ""
    state: str = ""
    """Its kind, if it is a weight, gradient or moment."""
    saved: bool = False
    gathered: bool = False
    """Whether it was made by gathering or copying weights."""
    communicated: bool = False
    detached: bool = False
    """Whether ``detach`` was called for it: ``checkpoint`` does so with what a recomputation saves."""
    kept: bool = False
    """Whether it was alive at the end of the pass that made it."""
    alive: bool = True

    def kind(self, phases: Sequence[Phase]) -> str:
        """Returns its kind (see above)."""
        phase = phases[self.phase]
        if self.state or self.saved:
            return self.state or "activations"
        if self.gathered:
            return "weights"
        if phase.action is not None and phase.action.kind != FORWARD and self.detached:
            return "activations"
        return "communication" if self.communicated else "activations" if self.kept else "temporary"


class Phase(NamedTuple):
    """A part of a step."""

    name: str
    action: Action | None
    """The pass, if it is one."""
    events: int
    """Number of events until its end."""


class Event(NamedTuple):
    """Something is allocated, freed or changes its size."""

    time: float
    block: int
    size: int
    """The change, in bytes."""


class Profile(TorchDispatchMode):
    """Records the allocations on one device in ``recording``. ``end_pass`` and ``end_phase`` divide it into phases."""

    def __init__(
        self,
        models: Iterable[nn.Module],
        state: Mapping[str, Tensor],
        masters: Mapping[str, nn.Parameter],
        copies: Iterable[nn.Parameter],
        device: torch.device,
    ) -> None:
        """
        Args:
            models: the model, or the stages of this rank, with the names of the whole model's parameters.
            state: master weights (model/NAME) and moments (optimizer/NAME.MOMENT).
            masters: the master weights themselves.
            copies: other copies of master weights.
        """
        super().__init__()
        self.models, self.state, self.device = list(models), state, device
        self.masters = {**masters, **{f"{number}.copy": copy for number, copy in enumerate(copies)}}
        self.blocks: list[Block] = []
        self.events: list[Event] = []
        self.phases: list[Phase] = []
        self.existing = 0
        """Number of events that say what was there before."""
        self.start = 0.0
        self._known: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}
        """Id of a living storage -> the storage and its block."""
        self._units: list[list[tuple[int, weakref.ref[torch.UntypedStorage]]]] = []
        """Blocks of weights that ``fully_shard`` empties and fills again together, with their storages."""
        self._calls: list[str] = []
        """The modules whose forward pass is running."""
        self._last = ""
        """The module whose saved tensors the backward pass has used last."""
        self._copies: dict[int, int] = {}
        """Id of the result of a reduce-scatter, until it is waited for -> block of gloo's copy of the input."""
        self._hooked: set[int] = set()
        self._stack = ExitStack()

    # What surrounds the step -----------------------------------------------------------------------------------------

    @contextmanager
    def recording(self, allocated: int = 0) -> Iterator[None]:
        """Records in this context. Nothing is left registered after it.

        Args:
            allocated: bytes that are allocated before, as far as it is known.
        """
        self.start = time.perf_counter()
        self._add_state()
        if (rest := allocated - sum(block.size for block in self.blocks)) > 0:
            self.blocks.append(Block(0, "", 0, state="other"))
            self._resize(len(self.blocks) - 1, rest)
        self.existing = len(self.events)
        with self._stack as stack:
            for model in self.models:
                for path, module in model.named_modules():
                    stack.callback(module.register_forward_pre_hook(partial(self._enter, path)).remove)
                    stack.callback(module.register_forward_hook(self._leave, always_call=True).remove)
            stack.enter_context(saved_tensors_hooks(self._pack, self._unpack))
            stack.enter_context(self)
            yield
            self.end_phase("end")
        self._known.clear()

    @torch.no_grad()
    def end_pass(self, action: Action) -> None:
        """Must be called after each pass."""
        names = {"F": "forward", "B": "backward", "W": "gradients of the weights"}
        self._end(f"{names[action.kind]}, stage {action.stage}, micro-batch {action.micro_batch}", action)

    @torch.no_grad()
    def end_phase(self, name: str) -> None:
        """Ends a phase that is not a pass."""
        self._end(name, None)

    def _end(self, name: str, action: Action | None) -> None:
        self._look_at_units()
        for model in self.models:
            for path, gradient in gradients_of(model, self.masters.items()):
                self._mark(gradient, "gradients", path)
        number = len(self.phases)
        for block in reversed(self.blocks):
            if block.phase < number:
                break
            block.kept = block.kept or (block.alive and action is not None)
        self.phases.append(Phase(name, action, len(self.events)))

    def _add_state(self) -> None:
        kinds = {"model/": "masters", "optimizer/": "moments"}
        for name, tensor in self.state.items():
            prefix = next(prefix for prefix in kinds if name.startswith(prefix))
            parameter = name.removeprefix(prefix)
            parameter = parameter.rpartition(".")[0] if kinds[prefix] == "moments" else parameter
            self._add_existing(tensor, kinds[prefix], parameter)
        for name, master in self.masters.items():
            self._add_existing(master, "masters", name)
        for model in self.models:
            for name, tensor in (*model.named_parameters(), *model.named_buffers()):
                self._add_existing(tensor, "weights", name)
                if tensor.grad is not None:
                    self._add_existing(tensor.grad, "gradients", name)

    def _add_existing(self, tensor: Tensor, kind: str, name: str) -> None:
        for plain in tensors_in(tensor):
            if id(plain.untyped_storage()) not in self._known and plain.device == self.device:
                self._add(plain.untyped_storage(), Block(0, _module_of(name), 0, state=kind))

    # What PyTorch calls ----------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = operator_name(func)
        given = {id(tensor.untyped_storage()) for tensor in tensors_in((args, kwargs))}
        made = {id(s): s for tensor in tensors_in(out) if id(s := tensor.untyped_storage()) not in given}
        self._look_at_units()
        collective = collective_name(func)
        known = [self._known[key][1] for key in given if key in self._known]
        copies = "gather" in (collective or "") or name in ("aten::clone", "aten::_to_copy")
        gathered = copies and bool(known) and all(self._is_weight(self.blocks[number]) for number in known)
        for key, storage in made.items():
            if key not in self._known and storage.device == self.device:
                known.append(self._add(storage, Block(0, self._path(), len(self.phases), name, gathered=gathered)))
            elif key in self._known:
                known.append(self._known[key][1])
        if collective is not None or name.startswith("fsdp::"):
            for number in known:
                self.blocks[number].communicated = True
            self._gloo_copies(str(collective), args, out)
        elif name == "aten::detach":
            for number in known:
                self.blocks[number].detached = True
        return out

    def _gloo_copies(self, collective: str, inputs: Any, outputs: Any) -> None:
        """gloo reduces a copy of the input of a functional reduce-scatter, until it is waited for."""
        if self.device.type != "cpu" or collective not in (
            "reduce_scatter_tensor",
            "reduce_scatter_tensor_coalesced",
            "wait_tensor",
        ):
            return
        key = id(next(tensors_in(outputs)).untyped_storage())
        if collective != "wait_tensor":
            size = sum(tensor.nbytes for tensor in tensors_in(inputs))
            self.blocks.append(Block(0, self._path(), len(self.phases), "gloo's copy", communicated=True))
            self._copies[key] = len(self.blocks) - 1
            self._resize(self._copies[key], size)
        elif key in self._copies:
            self._resize(self._copies.pop(key), 0)

    @staticmethod
    def _is_weight(block: Block) -> bool:
        return block.state in ("masters", "weights") or block.gathered

    def _path(self) -> str:
        return self._calls[-1] if self._calls else self._last

    def _enter(self, path: str, module: nn.Module, inputs: Any) -> None:
        """Is called before a module's forward pass, when ``fully_shard`` has gathered its weights."""
        self._calls.append(path)
        if id(module) in self._hooked:
            return
        self._hooked.add(id(module))
        unit = []
        for name, parameter in module.named_parameters():
            full = f"{path}.{name}" if path else name
            unit += self._mark(parameter.detach(), "weights", full)
            if parameter.requires_grad and id(parameter) not in self._hooked:
                self._hooked.add(id(parameter))
                self._stack.callback(parameter.register_hook(partial(self._gradient, full)).remove)
        self._units += [unit] if path and unit else [[weight] for weight in unit]

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._calls.pop()

    def _gradient(self, name: str, gradient: Tensor) -> None:
        self._mark(gradient, "gradients", name)

    @torch.no_grad()
    def _pack(self, tensor: Tensor) -> tuple[Tensor, str]:
        path = self._path()
        for plain in tensors_in(tensor):
            block = self._block(plain)
            if block is not None and not block.saved and not block.state:
                block.saved, block.path = True, path
        return tensor.detach(), path  # a graph that is kept longer would keep others

    def _unpack(self, packed: tuple[Tensor, str]) -> Tensor:
        tensor, self._last = packed
        return tensor

    # Blocks ----------------------------------------------------------------------------------------------------------

    def _add(self, storage: torch.UntypedStorage, block: Block) -> int:
        number, key = len(self.blocks), id(storage)
        self.blocks.append(block)
        self._known[key] = weakref.ref(storage, partial(self._free, key, number)), number
        self._resize(number, self._size(storage))
        return number

    def _free(self, key: int, number: int, reference: object) -> None:
        if self._known.pop(key, None) is None:
            return  # the recording is over
        self._resize(number, 0)
        self.blocks[number].alive = False

    def _resize(self, number: int, size: int) -> None:
        block = self.blocks[number]
        if size != block.size:
            self.events.append(Event(time.perf_counter() - self.start, number, size - block.size))
            block.size = size

    def _size(self, storage: torch.UntypedStorage) -> int:
        size = storage.nbytes()
        return size if self.device.type == "cpu" else -(-size // CUDA_BLOCK) * CUDA_BLOCK

    def _look_at_units(self) -> None:
        """Looks at the sizes of the weights that ``fully_shard`` has emptied or filled. (These are no operators.)"""
        for unit in self._units:
            number, reference = unit[0]
            if (storage := reference()) is not None and self._size(storage) != self.blocks[number].size:
                for number, reference in unit:
                    if (storage := reference()) is not None:
                        self._resize(number, self._size(storage))

    def _block(self, tensor: Tensor) -> Block | None:
        key = id(tensor.untyped_storage())
        return self.blocks[self._known[key][1]] if key in self._known else None

    def _mark(self, tensor: Tensor, kind: str, name: str) -> list[tuple[int, weakref.ref[torch.UntypedStorage]]]:
        """Says that a tensor is a weight or a gradient. Returns its block and storage, if it was not known to be one.

        (A gradient may be the same tensor as something saved: that of the head is computed with the loss.)
        """
        keys = [id(plain.untyped_storage()) for plain in tensors_in(tensor)]
        found = [self._known[key] for key in keys if key in self._known and not self.blocks[self._known[key][1]].state]
        for _, number in found:
            self.blocks[number].state, self.blocks[number].path = kind, _module_of(name)
        return [(number, reference) for reference, number in found]


def _module_of(parameter: str) -> str:
    return parameter.rpartition(".")[0]
