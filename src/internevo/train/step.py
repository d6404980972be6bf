"""One optimizer step, which is the same for every layout: forward and backward passes of the micro-batches, one all-reduce of
everything that all ranks must know, clipping, and the update."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..data.batches import MicroBatch, StepBatch
from ..models.config import DecoderConfig
from ..models.decoder import routers
from ..models.losses import HandedOn, Loss
from ..ops import foreach, on_device
from ..parallel import plan
from ..parallel.layout import Layout
from ..parallel.memory import Memory
from ..parallel.schedule import Schedule
from ..parallel.strategy import Collectives, Workload, add_up
from .parts import Parts
from .routing import RouterSums
from .shared import Shared


@dataclass
class Losses:
    """Sums of losses by dataset type: those of this rank until they are reduced, and then those of all ranks."""

    sums: Tensor
    """Sum of the losses of all tokens, fp64 [types]."""
    counts: Tensor
    """Number of predicted tokens, fp64 [types]."""

    @classmethod
    def zeros(cls, types: int, device: torch.device) -> Losses:
        """Makes sums of 0."""
        return cls(*(torch.zeros(types, dtype=torch.float64, device=device) for _ in range(2)))

    def add(self, losses: Tensor, batch: MicroBatch) -> None:
        """Adds the losses of a micro-batch, [B, S]."""
        types = batch.types.flatten().long()
        self.sums.index_add_(0, types, losses.detach().flatten().double())
        self.counts.index_add_(0, types, (batch.labels != -100).flatten().double())

    def mean(self) -> float:
        """Returns the mean loss over all predicted tokens; NaN if there are none."""
        return float(self.sums.sum() / self.counts.sum())

    def by_type(self, names: list[str]) -> dict[str, float]:
        """Returns type -> mean loss, for the types that have predicted tokens."""
        sums, counts = self.sums.tolist(), self.counts.tolist()
        return {name: s / c for name, s, c in zip(names, sums, counts, strict=True) if c}


@dataclass
class StepResult:
    """The results of a step, which are the same on every rank."""

    losses: Losses
    grad_norm: float
    """Global L2 norm of the gradient of the mean loss, before clipping."""
    skipped: bool
    """Whether the gradients were not finite, so that nothing was updated."""
    shared: Shared
    """The sums over all ranks."""
    routing: dict[str, Any] | None = None
    """Statistics of the routers, if the model has experts."""


class Stepper:
    """Takes the steps of a run."""

    def __init__(
        self,
        parts: Parts,
        end_phase: Callable[[str], None] = lambda name: None,
        before_update: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            end_phase: is called with the name of each part of a step that is not a pass, at its end.
            before_update: is called before the weights, moments and balance biases change. (A checkpoint may still copy them.)
        """
        self.end_phase, self.before_update = end_phase, before_update
        self.parts, self.device = parts, parts.world.device
        self.types, self.terms = len(parts.source.types), parts.terms
        self.clip = parts.config.hybrid_zero_optimizer.clip_grad_norm
        self.bias_speed = parts.config.model.moe_layer_kwargs.bias_update_speed
        self.replicas = {name: parts.axis.replica_count(name) for name in parts.axis.masters}
        """Weight -> number of ranks that have the same shard of it."""

    def __call__(self, batch: StepBatch, lr: float, beta2: float, get_shared: Callable[[], Shared]) -> StepResult:
        """Trains on one batch.

        Args:
            get_shared: returns the numbers that this rank shares. It is called after the backward passes.
        """
        parts = self.parts
        numbers, routed = self.enqueue(batch, lr, beta2, get_shared)
        result = self._result(numbers.get(), routed)
        if result.skipped:
            parts.optimizer.skipped()
        parts.scaler.update(result.skipped)
        return result

    def enqueue(self, batch: StepBatch, lr: float, beta2: float, get_shared: Callable[[], Shared]) -> tuple[Later, RouterSums]:
        """Does all of a step that the device computes, and waits only in ``before_update``. Arguments as for a step.

        Returns:
            The numbers of the step (``_result``), and the sums of the routers.
        """
        parts = self.parts
        # The loss is first divided by the number of all tokens. The number of predicted tokens is only known after the
        # all-reduce, so gradients are scaled to it together with clipping.
        expected = float(batch.tokens)
        losses, routed = self._forward_backward(batch, parts.scaler.scale / expected)
        sums = self._reduce(losses, routed, get_shared())
        norm, factor, finite = self._scale(sums, expected / parts.scaler.scale)
        # A GPU may be far behind. Only the numbers of this step are waited for, and meanwhile it updates the weights.
        numbers = Later(torch.cat([norm, finite, *sums]))
        self.end_phase("reduction of the gradients")
        self.before_update()
        parts.optimizer.step(lr, beta2, factor[0].float(), finite[0].float())
        parts.axis.masters_updated()
        self.end_phase("optimizer")
        parts.optimizer.zero_grad()
        if self.bias_speed:
            routed.balance(routers(parts.model.numbered_layers()), sums[3], self.bias_speed * finite)
        return numbers, routed

    def _forward_backward(self, batch: StepBatch, scale: float) -> tuple[Losses, RouterSums]:
        losses, routed = Losses.zeros(self.types, self.device), RouterSums(self.parts.decoder, self.device)

        def on_result(micro_batch: MicroBatch, result: Loss | HandedOn) -> None:
            if isinstance(result, Loss):
                losses.add(result.losses, micro_batch)
            routed.add(result.routed)

        self.parts.schedule.train(batch.micro_batches, self.terms, scale, on_result)
        return losses, routed

    def _reduce(self, losses: Losses, routed: RouterSums, shared: Shared) -> list[Tensor]:
        """Adds up everything that all ranks must know, in one all-reduce.

        Returns:
            The square of the norm of all gradients, the sums of losses, the numbers of predicted tokens, the sums of the
            routers, and ``shared``: fp64 vectors on the device.
        """
        gradients = self.parts.optimizer.gradients()
        norms = foreach.norms(list(gradients.values())).double()
        # Each shard must count once in the norm, even if several ranks have it.
        replicas = on_device([self.replicas[name] for name in gradients], self.device)
        squares = (norms.square() / replicas).sum()
        numbers = on_device(shared.pack(), self.device)
        sums = sum_over_ranks(squares.view(1), losses.sums, losses.counts, routed.values, numbers)
        # All ranks of a tensor group have counted the same tokens.
        sums[2:4] = (counted / self.parts.layout.tensor for counted in sums[2:4])
        return sums

    def _scale(self, sums: list[Tensor], unscale: float) -> tuple[Tensor, Tensor, Tensor]:
        """Computes how the gradients are scaled, on the device: fp64 tensors of one number.

        Returns:
            The norm of the gradients of the mean loss; the factor that turns the gradients into those, and clips them; and
            1, or 0 if something is not finite.
        """
        squares, losses, counts = sums[:3]
        to_mean = unscale / counts.sum(0, keepdim=True).clamp(min=1.0)
        norm = squares.sqrt() * to_mean
        finite = torch.isfinite(norm) & torch.isfinite(losses).all()
        return norm, to_mean * clip_factor(norm, self.clip), finite.double()

    def _result(self, numbers: Tensor, routed: RouterSums) -> StepResult:
        sizes = [1, 1, 1, self.types, self.types, routed.values.numel()]
        norm, finite, _, losses, counts, routed.values, shared = numbers.split([*sizes, numbers.numel() - sum(sizes)])
        summary = routed.summary(float(counts.sum()))
        return StepResult(Losses(losses, counts), float(norm), not finite, Shared.unpack(shared.tolist()), summary)


class Later:
    """A tensor that is copied from the device while it goes on computing."""

    def __init__(self, tensor: Tensor) -> None:
        self.copied = tensor.to("cpu", non_blocking=True)
        self.event = torch.cuda.Event() if tensor.is_cuda else None
        if self.event is not None:
            self.event.record()

    def get(self) -> Tensor:
        """Waits for the copy, and returns it."""
        if self.event is not None:
            self.event.synchronize()
        return self.copied


def formulas(parts: Parts, micro_batches: int) -> tuple[Memory | None, list[Collectives] | None]:
    """Returns the memory of this rank and the collectives of a step of this number of micro-batches, as the strategies state
    them; None with adapters, for which they do not."""
    if parts.decoder.lora is not None:
        return None, None
    world = parts.world
    work = Workload.from_config(parts.decoder, parts.config, parts.layout, micro_batches, world.device.type, world.rank)
    types, memory = len(parts.source.types), plan.memory(work)
    rows = [*plan.traffic(work), traffic(parts.decoder, types, parts.layout)]
    return replace(memory, activations=memory.activations + sums(parts.decoder, types)), add_up(rows, parts.layout)


def sums(decoder: DecoderConfig, types: int) -> int:
    """Returns the bytes of what is added up over a step: ``Losses`` and ``RouterSums``."""
    return 8 * (2 * types + RouterSums.size(decoder))


def traffic(decoder: DecoderConfig, types: int, layout: Layout) -> Collectives:
    """Returns the all-reduce of a step: the norm, losses and counts by dataset type, the sums of the routers, ``Shared``."""
    numbers = len(fields(Shared)) - 1 + layout.world
    return Collectives("all-reduce", "world", 1, 8 * (1 + 2 * types + RouterSums.size(decoder) + numbers))


def clip_factor(norm: Tensor, limit: float) -> Tensor:
    """Returns the factor by which ``clip_grad_norm_`` multiplies gradients.

    Args:
        norm: global L2 norm of the gradients.
        limit: the largest norm allowed; 0: no limit.
    """
    return (limit / (norm + 1e-6)).clamp(max=1.0) if limit > 0 else torch.ones_like(norm)


def sum_over_ranks(*vectors: Tensor) -> list[Tensor]:
    """Sums vectors (fp64) over all ranks, in one all-reduce."""
    packed = torch.cat(vectors)
    dist.all_reduce(packed)
    return list(packed.split([vector.numel() for vector in vectors]))


def evaluate(schedule: Schedule, layout: Layout, device: torch.device, batches: Iterable[MicroBatch], types: int) -> Losses:
    """Computes the losses over the batches of all ranks, by dataset type. All ranks must have the same number of batches."""
    losses = Losses.zeros(types, device)

    def on_result(micro_batch: MicroBatch, result: Loss | HandedOn) -> None:
        if isinstance(result, Loss):
            losses.add(result.losses, micro_batch)

    schedule.evaluate(batches, on_result)
    sums, counts = sum_over_ranks(losses.sums, losses.counts)
    return Losses(sums, counts / layout.tensor)
