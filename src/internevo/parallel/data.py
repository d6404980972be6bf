"""The data axis: ZeRO-1.5, plain data parallel and FSDP, as policies of one ``fully_shard``; and a single process.

Every policy keeps fp32 master weights, which the optimizer updates, and computes on full weights in the model's dtype.
Units are the decoder layers, the embedding, and the last norm with the head. On several ranks, master weights, gradients and
optimizer state are DTensors sharded over ``zero`` and replicated over ``replicate``:

| policy   | weights gathered                      | gradients                                            |
|----------|---------------------------------------|------------------------------------------------------|
| ZeRO-1.5 | once per step, at the first forward   | once per step: reduce-scatter over zero,             |
|          |                                       | all-reduce of the shard over replicate               |
| FSDP     | per use: each forward, each backward  | the same, per micro-batch                            |

Gradients are summed, not averaged: the loss is already divided by the global number of tokens. They are reduced in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from ..models import Decoder

COMPUTE = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class DataAxis(Protocol):
    """Who owns the weights of a run."""

    masters: dict[str, nn.Parameter]
    """fp32 weights by name, with their gradients: what the optimizer updates and checkpoints hold."""

    def before_micro_batch(self, last: bool) -> None:
        """A forward and backward is coming, the ``last`` of its step or not."""

    def masters_changed(self) -> None:
        """The masters have new values."""

    def after_forwards(self) -> None:
        """Forwards without a backward are over."""

    def after_backwards(self) -> None:
        """The last backward of a step is over: now the masters' gradients become whole sums."""

    def copies(self, name: str) -> int:
        """Ranks of the world that hold the same part of a master."""

    def whole_sequences(self) -> AbstractContextManager[None]:
        """Within it every rank computes all tokens: for generation, a token at a time."""


class SingleProcess:
    """One rank: nothing is sharded. In half precision the model's weights are copies of the masters, refreshed in place, and
    gradients move to the masters as soon as they are there. (``fully_shard`` on one rank copies every gradient twice more.)"""

    def __init__(self, model: Decoder, device: torch.device, dtype: torch.dtype) -> None:
        model.materialize(device)
        self.weights = dict(model.named_parameters())
        self.masters = self.weights
        if dtype != torch.float32:
            self.masters = {n: nn.Parameter(torch.empty_like(w)) for n, w in self.weights.items()}
            model.to(dtype)
            for name, weight in self.weights.items():
                weight.register_post_accumulate_grad_hook(_Move(self.masters[name]))

    def before_micro_batch(self, last: bool) -> None:
        pass

    @torch.no_grad()
    def masters_changed(self) -> None:
        if self.masters is not self.weights:
            torch._foreach_copy_(list(self.weights.values()), list(self.masters.values()))

    def after_forwards(self) -> None:
        pass

    def after_backwards(self) -> None:
        pass

    def copies(self, name: str) -> int:
        return 1

    def whole_sequences(self) -> AbstractContextManager[None]:
        return nullcontext()


@dataclass(frozen=True)
class Inner:
    """What a strategy inside a layer tells the data axis."""

    partial: frozenset[str] = frozenset()
    """Parameters that are whole on every inner rank, and whose gradients are parts of a sum over these ranks."""
    strategy: CutsSequences | None = None


class CutsSequences(Protocol):
    """A strategy that may cut sequences."""

    cut: bool


class _Move:
    """Adds a weight's gradient to its master's, in fp32."""

    def __init__(self, master: nn.Parameter) -> None:
        self.master = master

    def __call__(self, weight: Tensor) -> None:
        assert weight.grad is not None
        if self.master.grad is None:
            self.master.grad = weight.grad.float()
        else:
            self.master.grad += weight.grad
        weight.grad = None


class Sharded:
    """Several ranks: ``fully_shard`` over the mesh ("replicate", "zero")."""

    def __init__(
        self, model: Decoder, mesh: DeviceMesh, device: torch.device, dtype: torch.dtype, fsdp: bool, inner: Inner
    ) -> None:
        """
        Args:
            mesh: ("replicate", "zero", "inner").
            fsdp: gather per use rather than once per step.
            inner: what a strategy has made of the "inner" dimension.
        """
        self.model, self.fsdp, self.inner, self.world = model, fsdp, inner, mesh.size()
        self.inner_group = mesh.get_group("inner")
        mesh = mesh["replicate", "zero"]
        compute = None if dtype == torch.float32 else dtype
        precision = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32, cast_forward_inputs=False)
        ends: list[nn.Module | list[nn.Module]] = [model.embed, [model.norm, model.head]]
        if model.config.tie_embeddings:
            ends = []  # one weight cannot be in two units: both ends belong to the whole model's
        for unit in [*model.layers, *ends, model]:
            fully_shard(unit, mesh=mesh, mp_policy=precision, reshard_after_forward=fsdp)
        self.units = [module for module in model.modules() if isinstance(module, FSDPModule)]
        for unit in self.units:
            unit.set_gradient_divide_factor(1.0)
            # A divide factor would use PREMUL_SUM, which gloo has not.
            unit.set_force_sum_reduction_for_comms(True)
        model.to_empty(device=device)
        self.masters = dict(model.named_parameters())

    def before_micro_batch(self, last: bool) -> None:
        if not self.fsdp:
            root = self.units[0]
            root.set_requires_gradient_sync(last)
            root.set_reshard_after_backward(last)

    def masters_changed(self) -> None:
        pass  # the next forward gathers them

    def after_forwards(self) -> None:
        for unit in self.units:
            unit.reshard()

    @torch.no_grad()
    def after_backwards(self) -> None:
        """Gradients of whole parameters that are parts of a sum over the inner ranks: one all-reduce for all of them."""
        parts = [p.grad.to_local() for n, p in self.masters.items() if n in self.inner.partial and isinstance(p.grad, DTensor)]
        if parts:
            joined = torch.cat([part.flatten() for part in parts])
            dist.all_reduce(joined, group=self.inner_group)
            for part, whole in zip(parts, joined.split([part.numel() for part in parts]), strict=True):
                part.copy_(whole.view(part.shape))

    def copies(self, name: str) -> int:
        master = self.masters[name]
        assert isinstance(master, DTensor)
        shards = [n for n, place in zip(master.device_mesh.shape, master.placements, strict=True) if not place.is_replicate()]
        return self.world // math.prod(shards)

    @contextmanager
    def whole_sequences(self) -> Iterator[None]:
        strategy = self.inner.strategy
        before = strategy.cut if strategy else False
        try:
            if strategy:
                strategy.cut = False
            yield
        finally:
            if strategy:
                strategy.cut = before
