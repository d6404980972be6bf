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

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from ..config.training import HybridZeroOptimizer
from ..models.decoder import Decoder
from ..ops import foreach
from .gloo import Gathers, Reductions, wait_for
from .layout import Meshes
from .shards import local
from .strategy import Collectives, Inner, Workload

Shape = Sequence[int]


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
        self.copied: list[str] = []
        """Weights that have a master apart from them."""
        if dtype != torch.float32:
            # What is frozen needs no finer copy.
            self.copied = [name for name, weight in self.weights.items() if weight.requires_grad]
            self.masters = {**self.weights, **{n: nn.Parameter(torch.empty_like(self.weights[n])) for n in self.copied}}
            model.to(dtype)
            for name in self.copied:
                self.weights[name].register_post_accumulate_grad_hook(_Move(self.masters[name]))

    def before_micro_batch(self, last: bool) -> None:
        pass

    @torch.no_grad()
    def masters_changed(self) -> None:
        if self.copied:
            foreach.copy([self.weights[n] for n in self.copied], [self.masters[n] for n in self.copied])

    def after_forwards(self) -> None:
        pass

    def after_backwards(self) -> None:
        pass

    def copies(self, name: str) -> int:
        return 1

    def whole_sequences(self) -> AbstractContextManager[None]:
        return nullcontext()


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
        self,
        model: Decoder,
        meshes: Meshes,
        device: torch.device,
        dtype: torch.dtype,
        fsdp: bool,
        inner: Inner,
        config: HybridZeroOptimizer,
    ) -> None:
        """
        Args:
            meshes: the data axis is ("replicate", "zero") of the weights.
            fsdp: gather per use rather than once per step.
            inner: what a strategy inside the layers has done.
            config: how it communicates.
        """
        mesh = meshes.weights
        self.model, self.fsdp, self.inner = model, fsdp, inner
        self.ranks = mesh.size() // mesh["stage"].size()
        """That hold the weights of this stage."""
        replicas = mesh["replicate"].size()
        data_mesh = mesh["replicate", "zero"] if replicas > 1 else mesh["zero"]
        compute = None if dtype == torch.float32 else dtype
        precision = MixedPrecisionPolicy(
            param_dtype=compute, reduce_dtype=getattr(torch, config.grad_dtype), cast_forward_inputs=False
        )
        for modules in units(model, None if fsdp else config.reduce_bucket_size, lambda parameter: local(parameter).numel()):
            fully_shard(modules, mesh=data_mesh, mp_policy=precision, reshard_after_forward=fsdp)
        deferred = config.overlap_sync_grad and not fsdp and replicas == 1
        self.reductions = Reductions(deferred)
        # In the order of the forward pass, the whole model first.
        self.units = [module for module in model.modules() if isinstance(module, FSDPModule)]
        for unit, following in itertools.zip_longest(self.units, self.units[1:]):
            unit.set_gradient_divide_factor(1.0)
            # A divide factor would use PREMUL_SUM, which gloo has not.
            unit.set_force_sum_reduction_for_comms(True)
            if config.overlap_sync_param and following is not None:
                unit.set_modules_to_forward_prefetch([following])
            if not config.overlap_sync_grad:
                unit.set_all_reduce_hook(wait_for)
            if device.type == "cpu" and config.grad_dtype == "float32":
                unit.set_custom_reduce_scatter(cast(Any, self.reductions))
            if device.type == "cpu" and config.overlap_sync_param:
                unit.set_custom_all_gather(cast(Any, Gathers()))
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
        """Gradients that are parts of a sum over inner ranks: one all-reduce for all of a group."""
        self.reductions.wait()
        for group in dict.fromkeys(self.inner.partial.values()):
            grads = [self.masters[name].grad for name, its in self.inner.partial.items() if its is group]
            parts = [local(grad) for grad in grads if grad is not None]
            if not parts:  # nothing of the group's is trained (adapters on other linears)
                continue
            joined = torch.cat([part.flatten() for part in parts])
            dist.all_reduce(joined, group=group)
            for part, whole in zip(parts, joined.split([part.numel() for part in parts]), strict=True):
                part.copy_(whole.view(part.shape))

    def copies(self, name: str) -> int:
        master = self.masters[name]
        assert isinstance(master, DTensor)
        shards = [n for n, place in zip(master.device_mesh.shape, master.placements, strict=True) if not place.is_replicate()]
        return self.ranks // math.prod(shards)

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


def units(model: Decoder, bucket: int | None, size: Callable[[nn.Parameter], int]) -> list[list[nn.Module]]:
    """Modules whose parameters are gathered and whose gradients are reduced together, in the order of the forward pass:
    consecutive layers up to ``bucket`` elements (None: each by itself), both ends, and last the model with what is left.

    Args:
        size: elements of a parameter on this rank, before the data axis shards it.
    """
    joined: list[list[nn.Module]] = []
    space = 0
    for _, layer in model.numbered_layers():
        elements = sum(size(parameter) for parameter in layer.parameters())
        if bucket is None or elements > space:
            joined.append([])
            space = bucket or 0
        joined[-1].append(layer)
        space -= elements
    if model.config.tie_embeddings:
        return [*joined, [model]]  # one weight cannot be in two units: both ends belong to the whole model's
    first: list[list[nn.Module]] = [[model.embed]] if model.embed is not None else []
    last: list[list[nn.Module]] = [[model.norm, model.head]] if model.norm is not None and model.head is not None else []
    return [*first, *joined, *last, [model]]


def traffic(work: Workload, shapes: Sequence[Sequence[Shape]], partial: Mapping[str, Sequence[Shape]]) -> list[Collectives]:
    """Collectives of a step: see the table above. Shards that do not come out even are padded.

    Args:
        shapes: of each unit's parameters on a rank, before they are sharded here.
        partial: of those whose gradients are summed over an inner axis in the end, by the axis.
    """
    layout = work.layout
    passes = work.micro_batches if layout.fsdp else 1
    shards = [sum(_shard(shape, layout.zero) for shape in unit) for unit in shapes if unit]
    gathers = passes * (2 if layout.fsdp else 1)
    elements, count = layout.zero * sum(shards), len(shards)
    rows = [
        Collectives("all-gather", "zero", count, elements * work.element).times(gathers),
        Collectives("reduce-scatter", "zero", count, elements * work.gradient).times(passes),
        Collectives("all-reduce", "replicate", count, sum(shards) * work.gradient).times(passes),
    ]
    for axis, some in partial.items():
        rows.append(Collectives("all-reduce", axis, 1, 4 * sum(_shard(shape, layout.zero) for shape in some)))
    return rows


def memory(work: Workload, shapes: Sequence[Shape]) -> tuple[int, int, int]:
    """Bytes of masters, of moments, and of weights with gradients, on rank 0 (whose shards are the largest).

    | policy         | masters | moments | weights                | gradients |
    |----------------|---------|---------|------------------------|-----------|
    | ZeRO-1.5       | 4 P / z | 8 P / z | c P                    | g P       |
    | FSDP           | 4 P / z | 8 P / z | those of units in use  | 4 P / z   |
    | single process | 4 P     | 8 P     | c P; in fp32 masters   | 4 P       |

    P = parameters of a rank before they are sharded here, z = ranks of a ZeRO group; c, g = bytes of an element as it computes,
    and of a gradient.
    """
    layout = work.layout
    whole, shard = sum(math.prod(shape) for shape in shapes), sum(_shard(shape, layout.zero) for shape in shapes)
    alone = layout.world == 1
    weights = 0 if layout.fsdp or (alone and work.element == 4) else work.element * whole
    gradients = 4 * shard if layout.fsdp else (4 if alone else work.gradient) * whole
    return 4 * shard, 8 * shard, weights + gradients


def _shard(shape: Shape, ranks: int) -> int:
    """Elements of the largest part, when a tensor is cut along its first axis."""
    return -(-shape[0] // ranks) * math.prod(shape[1:])
