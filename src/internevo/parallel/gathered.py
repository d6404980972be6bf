"""The weights of isp: sharded over ranks and gathered for use, the next ones ahead (``set_prefetch_order`` says which).

The weights of linears that share an input are gathered together: q, k and v; o; gate and up; down. While they are used, the
next ones are prefetched. The gradient of a full weight is reduce-scattered as soon as it is computed, and waited for at the end
of the layer's backward pass. All weights of a layer's experts are gathered together, while those of the layer before are used;
their gradients are waited for at the end of the experts' backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from .. import ops
from ..config.parallel import Weight
from ..models.layers import DecoderLayer
from ..models.moe import ExpertLinear, ExpertMLPs
from ..ops.compiler import not_compiled
from .collectives import Group, start_all_gather, start_reduce_scatter, wait
from .deferred import Deferred, Products, product
from .recompute import is_recomputing
from .shards import local


class GatheredWeights:
    """The weights of linears that share an input, or of the experts of a layer, which are gathered together."""

    def __init__(
        self,
        layer: DecoderLayer,
        linears: Sequence[nn.Linear | ExpertLinear],
        group: Group,
        deferred: Deferred | None = None,
        dims: Sequence[int] = (),
    ) -> None:
        """
        Args:
            layer: the decoder layer that the linears belong to.
            group: the ranks over which the weights are sharded.
            deferred: where the gradients of the weights are left, if the schedule computes them later.
            dims: the dimension along which each weight is sharded. Empty: dimension 0.
        """
        self.layer, self.linears, self.group, self.deferred = layer, linears, group, deferred
        self.dims = dims or [0] * len(linears)
        self.unit: nn.Module = layer
        """The module whose weights the data axis gathers together, with these among them."""
        self.next_forward: list[GatheredWeights] = []
        """What is prefetched while these weights are used in the forward pass."""
        self.next_backward: list[GatheredWeights] = []
        """What is prefetched while these weights are used in the backward pass."""
        self.overlap = False
        """Whether weights are prefetched, and gradients are waited for at the end of the layer's backward pass."""
        self.of_layer: list[GatheredWeights] = [self]
        """The ``GatheredWeights`` of all linears of the layer, in the order of the forward pass."""
        self._pending: list[Tensor] | None = None
        """Full weights whose gather has been started."""
        self._for_backward: list[Tensor] | None = None
        """Full weights that a recomputation has gathered; the backward pass of the same layer is next and uses them."""
        self._backwards_due = 0
        """How many forward passes have had no backward pass yet; in a pipeline there may be several."""
        self._shards: list[Tensor] | None = None
        self._sending: list[Tensor] = []
        """Shards that are being gathered, or copies of them: kept alive like gradients."""
        self._in_flight: list[Tensor] = []
        """Gradients of full weights that a collective still reads. The collective does not keep them alive."""

    def shards(self) -> list[Tensor]:
        """Returns this rank's shards of the weights. With ``overlap``, the autograd node of a shard waits for its gradient.

        Autograd runs the nodes that were made last first. The nodes that wait are made for the whole layer, before anything
        else of the layer, so they run after everything else in the layer's backward pass.
        """
        if not self.overlap or self.deferred is not None:
            return self.local()
        if self is self.of_layer[0]:
            for weights in self.of_layer:
                weights._shards = list(_WaitForGradients.apply(weights, *weights.local()))
        shards, self._shards = self._shards, None
        assert shards is not None
        return shards

    def forward(self, shards: Sequence[Tensor], backward_follows: bool) -> list[Tensor]:
        """Returns the full weights for the forward pass. Those of a recomputation are kept for the backward pass after it."""
        if not is_recomputing(self.layer, self.layer.attn):
            self._backwards_due += backward_follows
            return self._gather(shards, self.next_forward)
        # Nothing would use prefetched weights of other layers, or of linears whose backward pass is over.
        following = [weights for weights in self.next_forward if weights.layer is self.layer and weights._backwards_due]
        full = self._gather(shards, following)
        self._for_backward = full if backward_follows else None
        return full

    def backward(self, shards: Sequence[Tensor]) -> list[Tensor]:
        """Returns the full weights for the backward pass."""
        kept, self._for_backward = self._for_backward, None
        self._backwards_due -= 1
        if kept is not None:
            return kept
        return self._gather(shards, [weights for weights in self.next_backward if weights._backwards_due])

    def start_reducing(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Starts to reduce-scatter the gradients of the full weights, and keeps them alive until ``wait_for_gradients``.

        Returns:
            The gradients of the shards, not yet complete.
        """
        self._in_flight = [grad.transpose(0, dim).contiguous() for grad, dim in zip(gradients, self.dims, strict=True)]
        return start_reduce_scatter(self._in_flight, self.group)

    def wait_for_gradients(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Waits for what ``start_reducing`` has returned."""
        complete = [wait(gradient) for gradient in gradients]
        self._in_flight = []
        return complete if not any(self.dims) else self._transposed(complete)

    def reduced(self, products: Products) -> list[Tensor]:
        """Computes the gradients of the full weights, and from them those of the shards."""
        return self.wait_for_gradients(self.start_reducing(products()))

    def local(self) -> list[Tensor]:
        """Returns this rank's shards of the weights."""
        return [local(linear.weight) for linear in self.linears]

    def _transposed(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Exchanges dimension 0, along which collectives work, with the one along which each weight is sharded."""
        return [tensor.transpose(0, dim) for tensor, dim in zip(tensors, self.dims, strict=True)]

    def _prefetch(self) -> None:
        """Starts to gather the weights, unless they are being gathered or have been."""
        if self._pending is None and self._for_backward is None:
            if isinstance(self.unit, FSDPModule):
                self.unit.unshard()  # so that the data axis has gathered this rank's shards before the layer is called
            self._pending = self._start_gathering([shard.detach() for shard in self.local()])

    def _gather(self, shards: Sequence[Tensor], following: list[GatheredWeights]) -> list[Tensor]:
        """Gathers the full weights, and prefetches ``following`` before it waits for them."""
        pending, self._pending = self._pending, None
        pending = pending if pending is not None else self._start_gathering(shards)
        for weights in following if self.overlap else ():
            weights._prefetch()
        full = self._transposed([wait(weight) for weight in pending])
        self._sending = []
        return full

    def _start_gathering(self, shards: Sequence[Tensor]) -> list[Tensor]:
        self._sending = [shard.contiguous() for shard in self._transposed(shards)]
        return start_all_gather(self._sending, self.group)


def set_prefetch_order(layers: Sequence[Sequence[GatheredWeights]], config: Weight, attention: int) -> None:
    """Decides which weights of linears are prefetched while which others are used.

    "module": always the next ones. "layer": all weights of the next layer, while those of one place in this layer are used.

    Args:
        layers: the weights of consecutive layers, in the order of the forward pass: those of attention (q, k and v; o); and of
            an MLP gate and up; down.
        config: ``parallel.weight``.
        attention: how many of a layer are those of attention.
    """
    in_order = [weights for of_layer in layers for weights in of_layer]
    for weights in in_order:
        weights.overlap = config.overlap
    for weights, following in pairwise(in_order):
        following.next_backward = [weights]
        # No layer before it has prefetched the first layer.
        if config.forward_overlap_per == "module" or following in layers[0]:
            weights.next_forward = [following]
    if config.forward_overlap_per == "layer":
        place = {"wqkv": 0, "attn": attention - 1, "wo": attention - 1, "w1": attention}[config.launch_allgather_before]
        for of_layer, next_layer in pairwise(layers):
            weights = of_layer[min(place, len(of_layer) - 1)]  # a layer with experts need not have an MLP
            weights.next_forward = [*weights.next_forward, *next_layer]


def set_prefetch_order_of_experts(layers: Sequence[GatheredWeights], overlap: bool) -> None:
    """Makes the experts of each layer prefetch those of the next layer that has experts, and in the backward pass those of the
    one before: one product of experts may be too short to hide a gather."""
    for weights in layers:
        weights.overlap = overlap
    for weights, following in pairwise(layers):
        weights.next_forward, following.next_backward = [following], [weights]


@not_compiled
def linears(weights: GatheredWeights, x_BSD: Tensor) -> tuple[Tensor, ...]:
    """Computes linears that share an input, without their biases. It is not compiled, because the compiler would move each wait
    to its gather."""
    shards = weights.shards()
    if weights.deferred is None:
        return _GatheredWeightLinears.apply(weights, x_BSD, (), *shards)
    return _GatheredWeightLinears.apply(weights, x_BSD, tuple(shards), *(shard.detach() for shard in shards))


class _WaitForGradients(torch.autograd.Function):
    """Returns shards of weights unchanged. The backward pass waits for their gradients."""

    @staticmethod
    def forward(ctx, weights: GatheredWeights, *shards: Tensor):  # type: ignore[no-untyped-def]
        ctx.weights = weights
        return tuple(shard.view_as(shard) for shard in shards)

    @staticmethod
    def backward(ctx, *grads: Tensor):  # type: ignore[no-untyped-def]
        return None, *ctx.weights.wait_for_gradients(grads)


class _GatheredWeightLinears(torch.autograd.Function):
    """Linears that share an input. Only the input and this rank's shards of the weights are kept for the backward pass."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, weights: GatheredWeights, x_BSD: Tensor, deferred_shards: tuple[Tensor, ...], *shards: Tensor
    ):
        ctx.weights, ctx.deferred_shards = weights, deferred_shards
        ctx.save_for_backward(x_BSD, *shards)
        # With adapters the weights are frozen, and the first layer's input needs no gradient: then no backward pass follows.
        return tuple(F.linear(x_BSD, weight) for weight in weights.forward(shards, any(ctx.needs_input_grad)))

    @staticmethod
    def backward(ctx, *grads: Tensor):  # type: ignore[no-untyped-def]
        x_BSD, *shards = ctx.saved_tensors
        weights: GatheredWeights = ctx.weights
        full = weights.backward(shards)
        flat_TF = [grad.flatten(0, 1) for grad in grads]
        # The gradients of the weights first: they are reduced while the gradient of the input is computed.
        trained = any(ctx.needs_input_grad[3:])
        full_grads = [product(grad, x_BSD) for grad in grads] if trained else []
        scattered = weights.start_reducing(full_grads) if trained else []
        grad_TD = flat_TF[0] @ full[0]
        for grad, weight in zip(flat_TF[1:], full[1:], strict=True):
            grad_TD += grad @ weight
        if weights.deferred is not None and any(shard.requires_grad for shard in ctx.deferred_shards):
            products = partial(_products, grads, x_BSD.detach())
            weights.deferred.leave(ctx.deferred_shards, partial(weights.reduced, products))
        elif not weights.overlap and trained:
            scattered = weights.wait_for_gradients(scattered)
        return None, grad_TD.view(x_BSD.shape), None, *(scattered if trained else [None] * len(shards))


def _products(grads: Sequence[Tensor], x_BSD: Tensor) -> list[Tensor]:
    return [product(grad, x_BSD) for grad in grads]


@not_compiled
def mlps(weights: GatheredWeights, experts: ExpertMLPs, rows_RD: Tensor, ends_E: Tensor, complete: bool) -> Tensor:
    """Replaces ``models.moe.mlps``."""
    shards, deferred = weights.local(), weights.deferred is not None
    deferred_shards = tuple(shards) if deferred else ()
    inputs = [shard.detach() for shard in shards] if deferred else shards
    return _GatheredExperts.apply(weights, experts.activation, rows_RD, ends_E, complete, deferred_shards, *inputs)


class _GatheredExperts(torch.autograd.Function):
    """The MLPs of experts. Their rows, gate and up are kept for the backward pass, and this rank's shards of the weights."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, weights: GatheredWeights, activation: str, rows: Tensor, ends: Tensor, complete: bool,
        deferred_shards: tuple[Tensor, ...], *shards: Tensor,
    ):  # fmt: skip
        ctx.weights, ctx.activation, ctx.complete, ctx.deferred_shards = weights, activation, complete, deferred_shards
        gate_weight, up_weight, down_weight = weights.forward(shards, any(ctx.needs_input_grad))
        gate, up = (ops.grouped_linear(rows, weight, ends, complete) for weight in (gate_weight, up_weight))
        ctx.save_for_backward(rows, ends, gate, up, *shards)
        return ops.grouped_linear(ops.gated(gate, up, activation), down_weight, ends, complete)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        rows, ends, gate, up, *shards = ctx.saved_tensors
        weights: GatheredWeights = ctx.weights
        gate_weight, up_weight, down_weight = (weight.transpose(1, 2) for weight in weights.backward(shards))
        grad_hidden = ops.grouped_linear(grad, down_weight, ends, ctx.complete)
        with torch.enable_grad():
            gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
            hidden = ops.gated(gate, up, ctx.activation)
        grad_gate, grad_up = torch.autograd.grad(hidden, (gate, up), grad_hidden)
        pairs = ((grad_gate, rows.detach()), (grad_up, rows.detach()), (grad, hidden.detach()))

        def products() -> list[Tensor]:
            return [ops.grouped_product(grad, x, ends) for grad, x in pairs]

        # The gradients of the weights first: they are reduced while the gradient of the rows is computed.
        trained = any(ctx.needs_input_grad[-len(shards) :])
        scattered = weights.start_reducing(products()) if trained else []
        if weights.deferred is not None and any(shard.requires_grad for shard in ctx.deferred_shards):
            weights.deferred.leave(ctx.deferred_shards, partial(weights.reduced, products))
        grad_rows = ops.grouped_linear(grad_gate, gate_weight, ends, ctx.complete)
        grad_rows += ops.grouped_linear(grad_up, up_weight, ends, ctx.complete)
        grads = weights.wait_for_gradients(scattered) if trained else [None] * len(shards)
        return None, None, grad_rows, None, None, None, *grads
