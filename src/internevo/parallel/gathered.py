"""Weights that are cut over ranks and gathered for use, with the next ones fetched while these are used (isp's prefetch).

Linears that share an input are gathered as one group: q, k and v; o; gate and up; down. Groups stand in the order of the
forward pass. A gradient of a full weight is reduce-scattered as soon as it is computed, and waited for when the rest of the
layer's backward pass is over.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ..config.parallel import Weight
from ..models.layers import DecoderLayer
from .collectives import Group, start_all_gather, start_reduce_scatter, wait
from .recompute import is_again
from .shards import local

PER_LAYER = ("wqkv", "wo", "w1", "w2")
"""The groups of a layer."""


class GatheredWeights:
    """The weights of linears that are gathered at once."""

    def __init__(self, layer: DecoderLayer, linears: Sequence[nn.Linear], group: Group) -> None:
        """``layer``: the decoder layer that the linears belong to."""
        self.layer, self.linears, self.group = layer, linears, group
        self.next_forward: list[GatheredWeights] = []
        """What is fetched while these are used in the forward pass."""
        self.next_backward: list[GatheredWeights] = []
        """The same in the backward pass."""
        self.overlap = False
        """Whether weights are fetched ahead, and gradients waited for later."""
        self.of_layer: list[GatheredWeights] = [self]
        """All of the layer's, in order."""
        self._pending: list[Tensor] | None = None
        """Full weights on their way."""
        self._for_backward: list[Tensor] | None = None
        """Full weights from a recomputation, whose backward pass is next."""
        self._backward_is_due = False
        self._parts: list[Tensor] | None = None
        self._in_flight: list[Tensor] = []
        """Gradients of full weights on their way: a collective reads them, and does not hold them."""

    def parts(self) -> list[Tensor]:
        """This rank's parts of the weights, whose gradients may still be on their way when they come here.

        Autograd runs what was made last first. The waits for all of a layer's gradients are made with its first group, so they
        run when the rest of the layer's backward pass is over.
        """
        if not self.overlap:
            return self._local()
        if self is self.of_layer[0]:
            for weights in self.of_layer:
                weights._parts = list(_WaitForGradients.apply(weights, *weights._local()))
        parts, self._parts = self._parts, None
        assert parts is not None
        return parts

    def forward(self, parts: Sequence[Tensor], backward_comes: bool) -> list[Tensor]:
        """The full weights for the forward pass. In a recomputation the layer's own backward is next: it gets the same."""
        if not is_again(self.layer, self.layer.attn):
            self._backward_is_due = backward_comes
            return self._gather(parts, self.next_forward)
        # Groups of other layers, or that had their backward, would be fetched for nobody.
        following = [weights for weights in self.next_forward if weights.layer is self.layer and weights._backward_is_due]
        full = self._gather(parts, following)
        self._for_backward = full if backward_comes else None
        return full

    def backward(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """The full weights for the backward pass."""
        kept, self._for_backward, self._backward_is_due = self._for_backward, None, False
        if kept is not None:
            return kept
        return self._gather(parts, [weights for weights in self.next_backward if weights._backward_is_due])

    def send(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """This rank's parts of the gradients of full weights, on their way."""
        return start_reduce_scatter(gradients, self.group)

    def hold(self, gradients: list[Tensor]) -> None:
        """Keeps what is sent alive until it is received."""
        self._in_flight = gradients

    def receive(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """This rank's parts of the gradients, when they are there."""
        received = [wait(gradient) for gradient in gradients]
        self._in_flight = []
        return received

    def _local(self) -> list[Tensor]:
        return [local(linear.weight) for linear in self.linears]

    def _fetch(self) -> None:
        """Starts to gather, unless that is under way."""
        if self._pending is None and self._for_backward is None:
            if isinstance(self.layer, FSDPModule):
                self.layer.unshard()  # the data axis gives a layer its part of the weights: now, not when the layer is called
            self._pending = start_all_gather([local(linear.weight.detach()) for linear in self.linears], self.group)

    def _gather(self, parts: Sequence[Tensor], following: list[GatheredWeights]) -> list[Tensor]:
        """The full weights; those of ``following`` are started on the way."""
        if not self.overlap:
            return [wait(weight) for weight in start_all_gather(parts, self.group)]
        pending, self._pending = self._pending, None
        pending = pending if pending is not None else start_all_gather(parts, self.group)
        for weights in following:
            weights._fetch()
        return [wait(weight) for weight in pending]


def connect(groups: list[GatheredWeights], config: Weight) -> None:
    """Who is fetched when: the next group ("module"), or all of the next layer's from one place of this layer on ("layer").

    ``groups``: of consecutive layers, ``PER_LAYER`` of each.
    """
    places = {"wqkv": 0, "attn": 1, "wo": 1, "w1": 2}
    for index, weights in enumerate(groups):
        weights.overlap = config.overlap
        place, by_module = index % len(PER_LAYER), config.forward_overlap_per == "module"
        if by_module or (index < len(PER_LAYER) - 1):  # nothing has fetched the first layer's
            weights.next_forward = groups[index + 1 : index + 2]
        if not by_module and place == places[config.launch_allgather_before]:
            following = index - place + len(PER_LAYER)
            weights.next_forward = [*weights.next_forward, *groups[following : following + len(PER_LAYER)]]
        weights.next_backward = groups[index - 1 : index] if index else []


@torch.compiler.disable  # type: ignore[untyped-decorator]
def linears(weights: GatheredWeights, x_BSD: Tensor) -> tuple[Tensor, ...]:
    """The linears of one input, without biases. Not compiled: a compiler would put the waits next to the gathers."""
    return _GatheredWeightLinears.apply(weights, x_BSD, *weights.parts())


class _WaitForGradients(torch.autograd.Function):
    """Parts of weights as they are; backward waits for their gradients."""

    @staticmethod
    def forward(ctx, weights: GatheredWeights, *parts: Tensor):  # type: ignore[override, no-untyped-def]
        ctx.weights = weights
        return tuple(part.view_as(part) for part in parts)

    @staticmethod
    def backward(ctx, *grads: Tensor):  # type: ignore[override, no-untyped-def]
        return None, *ctx.weights.receive(grads)


class _GatheredWeightLinears(torch.autograd.Function):
    """Linears of one input; only the input and this rank's parts of the weights are kept for backward."""

    @staticmethod
    def forward(ctx, weights: GatheredWeights, x_BSD: Tensor, *parts: Tensor):  # type: ignore[override, no-untyped-def]
        ctx.weights = weights
        ctx.save_for_backward(x_BSD, *parts)
        # Where nothing before it is trained (adapters beside frozen weights), no gradient comes to the first layer's input.
        return tuple(F.linear(x_BSD, weight) for weight in weights.forward(parts, any(ctx.needs_input_grad)))

    @staticmethod
    def backward(ctx, *grads: Tensor):  # type: ignore[override, no-untyped-def]
        x_BSD, *parts = ctx.saved_tensors
        weights: GatheredWeights = ctx.weights
        full = weights.backward(parts)
        rows_TD = x_BSD.flatten(0, 1)
        flat_TF = [grad.flatten(0, 1) for grad in grads]
        # Weights first: their gradients travel while the rest is computed.
        trained = any(ctx.needs_input_grad[2:])
        full_grads = [grad.t() @ rows_TD for grad in flat_TF] if trained else []
        scattered = weights.send(full_grads) if trained else []
        grad_TD = flat_TF[0] @ full[0]
        for grad, weight in zip(flat_TF[1:], full[1:], strict=True):
            grad_TD += grad @ weight
        if weights.overlap:
            weights.hold(full_grads)
        else:
            scattered = weights.receive(scattered)
        return None, grad_TD.view(x_BSD.shape), *(scattered if trained else [None] * len(parts))
