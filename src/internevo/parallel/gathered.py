"""The weights of isp: sharded over ranks and gathered for use, the next ones ahead (``set_prefetch_order`` says which).

The weights of linears that share an input are gathered together: q, k and v; o; gate and up; down. While they are used, the
next ones are prefetched. The gradient of a full weight is reduce-scattered as soon as it is computed, and waited for at the end
of the layer's backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ..config.parallel import Weight
from ..models.layers import DecoderLayer
from ..ops.compiler import not_compiled
from .collectives import Group, start_all_gather, start_reduce_scatter, wait
from .deferred import Deferred, product
from .recompute import is_recomputing
from .shards import local

PER_LAYER = ("wqkv", "wo", "w1", "w2")
"""Names of the ``GatheredWeights`` of a layer, in the order of the forward pass."""


class GatheredWeights:
    """The weights of linears that share an input, which are gathered together."""

    def __init__(
        self, layer: DecoderLayer, linears: Sequence[nn.Linear], group: Group, deferred: Deferred | None = None
    ) -> None:
        """
        Args:
            layer: the decoder layer that the linears belong to.
            group: the ranks over which the weights are sharded.
            deferred: where the gradients of the weights are left, if the schedule computes them later.
        """
        self.layer, self.linears, self.group, self.deferred = layer, linears, group, deferred
        self.next_forward: list[GatheredWeights] = []
        """What is prefetched while these weights are used in the forward pass."""
        self.next_backward: list[GatheredWeights] = []
        """What is prefetched while these weights are used in the backward pass."""
        self.overlap = False
        """Whether weights are prefetched, and gradients are waited for at the end of the layer's backward pass."""
        self.of_layer: list[GatheredWeights] = [self]
        """All ``GatheredWeights`` of the layer, in the order of the forward pass."""
        self._pending: list[Tensor] | None = None
        """Full weights whose gather has been started."""
        self._for_backward: list[Tensor] | None = None
        """Full weights that a recomputation has gathered; the backward pass of the same layer is next and uses them."""
        self._backwards_due = 0
        """How many forward passes have had no backward pass yet; in a pipeline there may be several."""
        self._shards: list[Tensor] | None = None
        self._in_flight: list[Tensor] = []
        """Gradients of full weights that a collective still reads. The collective does not keep them alive."""

    def shards(self) -> list[Tensor]:
        """Returns this rank's shards of the weights. With ``overlap``, the autograd node of a shard waits for its gradient.

        Autograd runs the nodes that were made last first. The nodes that wait are made for the whole layer, before anything
        else of the layer, so they run after everything else in the layer's backward pass.
        """
        if not self.overlap or self.deferred is not None:
            return self._local()
        if self is self.of_layer[0]:
            for weights in self.of_layer:
                weights._shards = list(_WaitForGradients.apply(weights, *weights._local()))
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
        """Starts to reduce-scatter the gradients of the full weights. Returns the gradients of the shards, not yet complete."""
        return start_reduce_scatter(gradients, self.group)

    def keep_alive(self, gradients: list[Tensor]) -> None:
        """Keeps the gradients of the full weights alive until ``wait_for_gradients``."""
        self._in_flight = gradients

    def wait_for_gradients(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Waits for what ``start_reducing`` has returned."""
        complete = [wait(gradient) for gradient in gradients]
        self._in_flight = []
        return complete

    def reduced_products(self, grads: Sequence[Tensor], x_BSD: Tensor) -> list[Tensor]:
        """Computes the gradients of the shards from those of the outputs and the input."""
        full_grads = [product(grad, x_BSD) for grad in grads]
        return [wait(gradient) for gradient in self.start_reducing(full_grads)]

    def _local(self) -> list[Tensor]:
        return [local(linear.weight) for linear in self.linears]

    def _prefetch(self) -> None:
        """Starts to gather the weights, unless they are being gathered or have been."""
        if self._pending is None and self._for_backward is None:
            if isinstance(self.layer, FSDPModule):
                self.layer.unshard()  # so that the data axis has gathered this rank's shards before the layer is called
            self._pending = start_all_gather([local(linear.weight.detach()) for linear in self.linears], self.group)

    def _gather(self, shards: Sequence[Tensor], following: list[GatheredWeights]) -> list[Tensor]:
        """Gathers the full weights, and prefetches ``following`` before it waits for them."""
        if not self.overlap:
            return [wait(weight) for weight in start_all_gather(shards, self.group)]
        pending, self._pending = self._pending, None
        pending = pending if pending is not None else start_all_gather(shards, self.group)
        for weights in following:
            weights._prefetch()
        return [wait(weight) for weight in pending]


def set_prefetch_order(layers: list[GatheredWeights], config: Weight) -> None:
    """Decides which weights are prefetched while which others are used.

    "module": always the next ones. "layer": all weights of the next layer, while those of one place in this layer are used.

    Args:
        layers: the weights of consecutive layers, ``PER_LAYER`` of each.
        config: ``parallel.weight``.
    """
    places = {"wqkv": 0, "attn": 1, "wo": 1, "w1": 2}
    for index, weights in enumerate(layers):
        weights.overlap = config.overlap
        place, by_module = index % len(PER_LAYER), config.forward_overlap_per == "module"
        if by_module or (index < len(PER_LAYER) - 1):  # no layer before it has prefetched the first layer
            weights.next_forward = layers[index + 1 : index + 2]
        if not by_module and place == places[config.launch_allgather_before]:
            following = index - place + len(PER_LAYER)
            weights.next_forward = [*weights.next_forward, *layers[following : following + len(PER_LAYER)]]
        weights.next_backward = layers[index - 1 : index] if index else []


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
            weights.deferred.leave(ctx.deferred_shards, partial(weights.reduced_products, grads, x_BSD))
        elif weights.overlap:
            weights.keep_alive(full_grads)
        else:
            scattered = weights.wait_for_gradients(scattered)
        return None, grad_TD.view(x_BSD.shape), None, *(scattered if trained else [None] * len(shards))
