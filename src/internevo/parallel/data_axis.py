"""The data axis: ZeRO-1.5, plain data parallel and FSDP, as policies of one ``fully_shard``; and a single process.

With every policy, the optimizer updates fp32 master weights, and the model computes with full weights in its own dtype.
Units are the decoder layers, the embedding, and the last norm with the head. On several ranks, master weights, gradients and
optimizer state are DTensors, sharded over ``zero`` and replicated over ``replicate``:

| policy   | when weights are gathered                    | when gradients are reduced                        |
|----------|----------------------------------------------|---------------------------------------------------|
| ZeRO-1.5 | once per step, in the first forward pass     | once per step: reduce-scatter over zero, then     |
|          |                                              | all-reduce of the shard over replicate            |
| FSDP     | in each forward pass and each backward pass; | the same, for each micro-batch                    |
|          | the head, which is used at the end of one    |                                                   |
|          | and at the beginning of the other, once      |                                                   |

Gradients are summed and not averaged, because the loss is divided by the number of tokens of the global batch. They are reduced
in ``hybrid_zero_optimizer.grad_dtype``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from ..config.training import HybridZeroOptimizer
from ..models.decoder import Decoder
from ..models.layers import Head
from ..models.moe import ExpertMLPs
from ..ops import foreach
from ..ops.accumulate import accumulate
from . import gloo
from .accumulated import accumulate_in_reduce_dtype
from .gloo import AllGather, ReduceScatter, wait_for_reduction
from .layout import Meshes
from .prefetch import experts_in, set_backward_prefetch, set_forward_prefetch
from .shards import local, shard_dim_of_experts
from .strategy import AppliedStrategy, Collectives, Workload

Shape = tuple[int, ...]


class Weights(Protocol):
    """The weights of a rank: their masters, and what must be done between passes."""

    masters: dict[str, nn.Parameter]
    """Name -> fp32 master weight, with its gradient. The optimizer updates them, and checkpoints contain them."""
    copies: Sequence[nn.Parameter]
    """Copies of master weights on this rank, which the optimizer does not see."""

    model_weights: dict[str, Tensor]
    """Name -> the model's weight, where it is another tensor than the master. The optimizer updates it together with that."""

    def masters_changed(self) -> None:
        """Must be called after the master weights have been filled, and before the next forward pass."""

    def masters_updated(self) -> None:
        """Must be called after the optimizer has updated the master weights and ``model_weights``."""

    def after_forwards(self) -> None:
        """Must be called after forward passes that no backward pass follows. Frees gathered weights."""

    def after_backwards(self) -> None:
        """Must be called after the last backward pass of a step. Completes the reduction of the gradients."""

    def replica_count(self, name: str) -> int:
        """Returns the number of ranks of the world that have the same shard of a master weight."""

    def unsharded_sequences(self) -> AbstractContextManager[None]:
        """A context in which every rank computes all tokens. Generation needs it, since it computes one token at a time."""


class DataAxis(Weights, Protocol):
    """Owns the weights of a model or a stage of it: keeps the masters, gathers full weights, and reduces gradients."""

    def before_backward(self, last: bool) -> None:
        """Must be called before each backward pass. ``last``: its end completes the gradients of a step, which it reduces."""

    def after_weights(self, last: bool) -> None:
        """Must be called after each pass that computes gradients of weights apart from backward passes. ``last``: they complete
        the gradients of a step, which it reduces."""


class SingleProcess:
    """The data axis of a single rank, which shards nothing.

    In half precision, the model's weights are copies of the masters, which the optimizer updates; each gradient is added to its
    master's as soon as it is computed. (``fully_shard`` on one rank would copy every gradient two more times.)
    """

    def __init__(self, model: Decoder, device: torch.device, dtype: torch.dtype) -> None:
        model.to(dtype)
        model.materialize(device)
        weights = dict(model.named_parameters())
        self.masters = weights
        self.copies: Sequence[nn.Parameter] = ()
        self.model_weights: dict[str, Tensor] = {}
        if dtype != torch.float32:
            # Frozen weights are not updated, so they need no master in fp32.
            trained = {name: weight for name, weight in weights.items() if weight.requires_grad}
            self.masters = {**weights, **{name: _master_of(weight) for name, weight in trained.items()}}
            for name, weight in trained.items():
                weight.register_post_accumulate_grad_hook(_AddToMaster(self.masters[name]))
            self.model_weights = {name: weight.detach() for name, weight in trained.items()}

    def before_backward(self, last: bool) -> None:
        pass

    def after_weights(self, last: bool) -> None:
        pass

    @torch.no_grad()
    def masters_changed(self) -> None:
        if self.model_weights:
            foreach.copy(list(self.model_weights.values()), [self.masters[name] for name in self.model_weights])

    def masters_updated(self) -> None:
        pass

    def after_forwards(self) -> None:
        pass

    def after_backwards(self) -> None:
        pass

    def replica_count(self, name: str) -> int:
        return 1

    def unsharded_sequences(self) -> AbstractContextManager[None]:
        return nullcontext()


def _master_of(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(weight, dtype=torch.float32))


class _AddToMaster:
    """A hook that adds a weight's gradient to its master's gradient in fp32, and then frees it."""

    def __init__(self, master: nn.Parameter) -> None:
        self.master = master

    def __call__(self, weight: Tensor) -> None:
        assert weight.grad is not None
        self.master.grad = accumulate(self.master.grad, weight.grad)
        weight.grad = None


class Sharded:
    """The data axis of several ranks: ``fully_shard`` over the mesh dimensions ("replicate", "zero")."""

    def __init__(
        self,
        model: Decoder,
        meshes: Meshes,
        device: torch.device,
        dtype: torch.dtype,
        fsdp: bool,
        inner: AppliedStrategy,
        config: HybridZeroOptimizer,
    ) -> None:
        """
        Args:
            meshes: all meshes of the run.
            dtype: dtype of the full weights with which the model computes.
            fsdp: whether weights are gathered for each use (FSDP), or once per step (ZeRO-1.5).
            inner: what the strategies inside the layers have returned.
            config: overlap, buckets and the dtype in which gradients are reduced.
        """
        self.model, self.fsdp, self.inner, self.device = model, fsdp, inner, device
        self.model_weights: dict[str, Tensor] = {}
        self.ranks = meshes.weights.size()
        """The number of ranks that share the weights of this stage."""
        compute = None if dtype == torch.float32 else dtype
        precision = MixedPrecisionPolicy(
            param_dtype=compute, reduce_dtype=getattr(torch, config.grad_dtype), cast_forward_inputs=False
        )
        apart = meshes.experts is not None
        joined = units(model, None if fsdp else config.reduce_bucket_size, lambda parameter: local(parameter).numel(), apart)
        shard = partial(fully_shard, mp_policy=precision)
        if meshes.experts is not None:
            placement = _expert_placement(meshes.experts["zero"].size())
            for experts in experts_in([model]):
                shard(experts, mesh=_data_mesh(meshes.experts), shard_placement_fn=placement, reshard_after_forward=fsdp)
        for modules in joined:
            shard(modules, mesh=_data_mesh(meshes.weights), reshard_after_forward=fsdp and not _has_head(modules))
        if fsdp:
            set_backward_prefetch(joined[:-1], apart)
        may_defer = config.overlap_sync_grad and not fsdp
        self.reduce_scatter, self.reduce_scatter_experts = (
            ReduceScatter(may_defer and mesh["replicate"].size() == 1)
            for mesh in (meshes.weights, meshes.experts or meshes.weights)
        )
        # In the order of the forward pass; the whole model is the first.
        self.units = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self._set_collectives(config, apart)
        model.to_empty(device=device)
        self.masters = dict(model.named_parameters())
        self.copies: Sequence[nn.Parameter] = ()

    def _set_collectives(self, config: HybridZeroOptimizer, apart: bool) -> None:
        """Makes the units sum gradients, and communicate while something computes, or not, as the config says.

        Args:
            apart: the experts of a layer are a unit of their own.
        """
        on_gloo = gloo.is_used(self.device)
        for unit in self.units:
            unit.set_gradient_divide_factor(1.0)
            # Otherwise the divide factor is applied with PREMUL_SUM, which gloo does not have.
            unit.set_force_sum_reduction_for_comms(True)
            if not config.overlap_sync_grad:
                unit.set_all_reduce_hook(wait_for_reduction)
            if on_gloo and config.grad_dtype == "float32":
                of_experts = apart and isinstance(unit, ExpertMLPs)
                unit.set_custom_reduce_scatter(cast(Any, self.reduce_scatter_experts if of_experts else self.reduce_scatter))
            if on_gloo and config.overlap_sync_param:
                unit.set_custom_all_gather(cast(Any, AllGather()))
        if config.overlap_sync_param:
            set_forward_prefetch(self.units, apart)

    def before_backward(self, last: bool) -> None:
        if not self.fsdp:
            root = self.units[0]
            root.set_requires_gradient_sync(last)
            root.set_reshard_after_backward(last)

    def after_weights(self, last: bool) -> None:
        accumulate_in_reduce_dtype(self.units)
        if last:
            # PyTorch's own schedules reduce gradients by this method, the only public way. The import takes a second.
            from torch.distributed.pipelining import PipelineStage

            PipelineStage(self.model, 0, dist.get_world_size(), self.device).perform_reduce_grad(1)

    def masters_changed(self) -> None:
        pass  # the next forward pass gathers them

    def masters_updated(self) -> None:
        pass

    def after_forwards(self) -> None:
        for unit in self.units:
            unit.reshard()

    @torch.no_grad()
    def after_backwards(self) -> None:
        """Sums the partial gradients over the groups of the strategy inside the layers, with one all-reduce per group."""
        self.reduce_scatter.wait()
        self.reduce_scatter_experts.wait()
        summed = self.inner.partial_gradients
        for group in dict.fromkeys(summed.values()):
            grads = [self.masters[name].grad for name, its in summed.items() if its is group]
            parts = [local(grad) for grad in grads if grad is not None]
            if not parts:  # none of these parameters is trained (adapters are on other linears)
                continue
            joined = torch.cat([part.flatten() for part in parts])
            dist.all_reduce(joined, group=group)
            for part, total in zip(parts, joined.split([part.numel() for part in parts]), strict=True):
                part.copy_(total.view(part.shape))

    def replica_count(self, name: str) -> int:
        master = self.masters[name]
        assert isinstance(master, DTensor)
        shards = [n for n, place in zip(master.device_mesh.shape, master.placements, strict=True) if not place.is_replicate()]
        return self.ranks // math.prod(shards)

    @contextmanager
    def unsharded_sequences(self) -> Iterator[None]:
        before = [strategy.shard_sequence for strategy in self.inner.strategies]
        try:
            for strategy in self.inner.strategies:
                strategy.shard_sequence = False
            yield
        finally:
            for strategy, shard_sequence in zip(self.inner.strategies, before, strict=True):
                strategy.shard_sequence = shard_sequence


def _data_mesh(mesh: DeviceMesh) -> DeviceMesh:
    return mesh["replicate", "zero"] if mesh["replicate"].size() > 1 else mesh["zero"]


def _has_head(modules: Sequence[nn.Module]) -> bool:
    """Whether a unit is needed at the end of the forward pass, and again at once, at the beginning of the backward pass."""
    return any(isinstance(module, Head) or (isinstance(module, Decoder) and module.head is not None) for module in modules)


def _expert_placement(ranks: int) -> Callable[[nn.Parameter], Shard]:
    return lambda parameter: Shard(shard_dim_of_experts(local(parameter).shape, ranks))


def units(
    model: Decoder, bucket: int | None, size: Callable[[nn.Parameter], int], experts_apart: bool
) -> list[list[nn.Module]]:
    """Returns the units, in the order of the forward pass: lists of modules whose parameters are gathered together, and whose
    gradients are reduced together.

    The units are the embedding, layers, the last norm with the head, and at the end the model, with all other parameters.

    Args:
        bucket: consecutive layers with up to this many elements form one unit; None: each layer is a unit.
        size: returns the number of elements that a parameter has on this rank before the data axis shards it.
        experts_apart: the experts of a layer are a unit of their own, which is not among these.
    """
    layers, sizes = [layer for _, layer in model.numbered_layers()], list[int]()
    for layer in layers:
        apart = {id(p) for experts in experts_in([layer]) for p in experts.parameters()} if experts_apart else ()
        sizes.append(sum(size(parameter) for parameter in layer.parameters() if id(parameter) not in apart))
    joined: list[list[nn.Module]] = [[layers[number] for number in unit] for unit in join(sizes, bucket)]
    if model.config.tie_embeddings:
        return [*joined, [model]]  # one weight cannot be in two units, so the embedding and the head belong to the model's
    first: list[list[nn.Module]] = [[model.embed]] if model.embed is not None else []
    last: list[list[nn.Module]] = [[model.norm, model.head]] if model.norm is not None and model.head is not None else []
    return [*first, *joined, *last, [model]]


def join(sizes: Sequence[int], bucket: int | None) -> list[list[int]]:
    """Joins consecutive layers to units of up to ``bucket`` elements. Returns the positions of the layers of each unit.

    Args:
        sizes: the number of elements of each layer.
        bucket: None: each layer is a unit.
    """
    joined, space = list[list[int]](), 0
    for number, elements in enumerate(sizes):
        if bucket is None or elements > space:
            joined.append([])
            space = bucket or 0
        joined[-1].append(number)
        space -= elements
    return joined


def traffic(
    work: Workload,
    shapes: Sequence[Sequence[Shape]],
    experts: Mapping[int, Sequence[Shape]],
    summed: Mapping[str, Sequence[Shape]],
    heads: bool,
) -> list[Collectives]:
    """Returns the collectives of a step (see the table above). Shards of uneven size are padded.

    Args:
        shapes: for each unit, the shapes that its parameters have on a rank before the data axis shards them.
        experts: layer -> the same for its experts, if they are a unit of their own.
        summed: axis -> such shapes of the parameters whose gradients are summed over that axis at the end of a step.
        heads: the last unit has the head.
    """
    layout, rows = work.layout, list[Collectives]()
    passes = work.micro_batches if layout.fsdp else 1
    for axis, replicas, ranks, units_ in (
        ("zero", "replicate", layout.zero, shapes),
        ("expert zero", "expert replicate", layout.expert_zero, list(experts.values())),
    ):
        of_experts = axis == "expert zero"
        count, elements = sharded(units_, ranks, of_experts)
        gathers = [(count, elements)]
        if layout.fsdp:  # again for the backward pass, but for the head
            gathers.append(sharded(units_[:-1], ranks, of_experts) if heads and not of_experts else (count, elements))
        rows += [
            *(Collectives("all-gather", axis, n, ranks * size * work.element_bytes).times(passes) for n, size in gathers),
            Collectives("reduce-scatter", axis, count, ranks * elements * work.gradient_bytes).times(passes),
            Collectives("all-reduce", replicas, count, elements * work.gradient_bytes).times(passes),
        ]
    for axis, shapes_of_axis in summed.items():
        elements = sum(shard_size(shape, layout.zero, work.zero_rank) for shape in shapes_of_axis)
        rows.append(Collectives("all-reduce", axis, 1, 4 * elements))
    return rows


def sharded(units: Sequence[Sequence[Shape]], ranks: int, of_experts: bool) -> tuple[int, int]:
    """Returns the number of units that have parameters, and the elements of the largest shards of all of them together."""
    shard = expert_shard_size if of_experts else shard_size
    alike = Counter(tuple(unit) for unit in units if unit)
    return alike.total(), sum(times * sum(shard(shape, ranks) for shape in unit) for unit, times in alike.items())


def shard_size(shape: Shape, ranks: int, place: int = 0) -> int:
    """Returns the number of elements of a shard of a tensor that is sharded along dimension 0. The first one is the largest."""
    rows = -(-shape[0] // ranks)
    return max(0, min(rows, shape[0] - place * rows)) * math.prod(shape[1:])


def expert_shard_size(shape: Shape, ranks: int, place: int = 0) -> int:
    """The same of the weights of a rank's experts."""
    if shard_dim_of_experts(shape, ranks) == 1:
        return math.prod(shape) // ranks
    return shard_size(shape, ranks, place)
