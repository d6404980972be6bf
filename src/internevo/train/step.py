"""One optimizer step, the same for every layout: forward and backward of each micro-batch, one reduction of all that every rank
must know, clipping, update."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..data.batches import MicroBatch, StepBatch
from ..models.config import DecoderConfig
from ..models.losses import Loss
from ..ops import foreach
from ..parallel import plan
from ..parallel.layout import Layout
from ..parallel.memory import Memory
from ..parallel.strategy import Collectives, Workload, add_up
from .parts import Parts
from .routing import RouterSums
from .shared import Shared


@dataclass
class Losses:
    """Sums over tokens, by dataset type; this rank's until they are reduced."""

    sums: Tensor
    """fp64 [types]"""
    counts: Tensor
    """fp64 [types]: predicted tokens."""

    @classmethod
    def zeros(cls, types: int, device: torch.device) -> Losses:
        """Nothing yet."""
        return cls(*(torch.zeros(types, dtype=torch.float64, device=device) for _ in range(2)))

    def add(self, losses: Tensor, batch: MicroBatch) -> None:
        """Adds a micro-batch's losses [B, S]."""
        types = batch.types.flatten().long()
        self.sums.index_add_(0, types, losses.detach().flatten().double())
        self.counts.index_add_(0, types, (batch.labels != -100).flatten().double())

    def mean(self) -> float:
        """Mean over all predicted tokens."""
        return float(self.sums.sum() / self.counts.sum().clamp(min=1))

    def by_type(self, names: list[str]) -> dict[str, float]:
        """Mean of each type that occurred."""
        sums, counts = self.sums.tolist(), self.counts.tolist()
        return {name: s / c for name, s, c in zip(names, sums, counts, strict=True) if c}


@dataclass
class StepResult:
    """What a step found, the same on every rank."""

    losses: Losses
    grad_norm: float
    """Global L2 norm before clipping, of the gradient of the mean loss."""
    skipped: bool
    """The gradients were not finite; nothing was updated."""
    shared: Shared
    """Sums over all ranks."""
    routing: dict[str, Any] | None = None
    """What the routers did, in a model with experts."""


class Stepper:
    """Takes steps with the parts of a run."""

    def __init__(self, parts: Parts) -> None:
        self.parts, self.device = parts, parts.world.device
        self.types, self.terms = len(parts.source.types), parts.terms
        self.clip = parts.config.hybrid_zero_optimizer.clip_grad_norm
        self.copies = {name: parts.axis.replica_count(name) for name in parts.axis.masters}
        """Ranks that hold the same part of each weight."""

    def __call__(self, batch: StepBatch, lr: float, beta2: float, share: Callable[[], Shared]) -> StepResult:
        """Trains on one batch. ``share`` is asked for this rank's numbers when the gradients are there."""
        parts = self.parts
        # Gradients are those of the sum of losses over a fixed number; the true number of predicted tokens is known when
        # all ranks have been asked, and enters with the clipping.
        expected = float(batch.tokens)
        losses, routed = self._forward_backward(batch, parts.scaler.scale / expected)
        result, to_mean = self._reduce(losses, routed, expected / parts.scaler.scale, share())
        if not result.skipped:
            parts.optimizer.scale_gradients(to_mean * clip_factor(result.grad_norm, self.clip))
            parts.optimizer.step(lr, beta2)
            parts.axis.masters_changed()
        parts.optimizer.zero_grad()
        parts.scaler.update(result.skipped)
        return result

    def _forward_backward(self, batch: StepBatch, scale: float) -> tuple[Losses, RouterSums]:
        losses, routed = Losses.zeros(self.types, self.device), RouterSums(self.parts.decoder, self.device)

        def done(micro_batch: MicroBatch, loss: Loss) -> None:
            losses.add(loss.losses, micro_batch)
            routed.add(loss)

        self.parts.schedule.train(batch.micro_batches, self.terms, scale, done)
        return losses, routed

    def _reduce(self, losses: Losses, routed: RouterSums, unscale: float, share: Shared) -> tuple[StepResult, float]:
        """One all-reduce of everything that all ranks must know. Returns the factor from gradients to those of the mean."""
        gradients = self.parts.optimizer.gradients()
        norms = foreach.norms(list(gradients.values())).double()
        # Every part counts once, however many ranks hold it.
        copies = torch.tensor([self.copies[name] for name in gradients], dtype=torch.float64, device=self.device)
        squares = (norms.square() / copies).sum()
        shared = torch.tensor(share.pack(), dtype=torch.float64, device=self.device)
        square_sum, sums, counts, routing, shared = over_ranks(
            squares.view(1), losses.sums, losses.counts, routed.values, shared
        )
        counts = counts / self.parts.layout.tensor  # the ranks of a tensor group have counted the same tokens
        predicted = float(counts.sum())
        to_mean = unscale / max(predicted, 1.0)
        norm = float(square_sum.sqrt()) * to_mean
        finite = math.isfinite(norm) and bool(torch.isfinite(sums).all())
        summary = routed.summary(routing, predicted)
        return StepResult(Losses(sums, counts), norm, not finite, Shared.unpack(shared.tolist()), summary), to_mean


def formulas(parts: Parts) -> tuple[Memory, list[Collectives]] | None:
    """Memory of rank 0, and the collectives of a step, as the strategies state them; None with adapters, of which they state
    nothing."""
    if parts.decoder.lora is not None:
        return None
    micro_batches = parts.sizes.micro_batches(parts.state.cursor.batch)
    work = Workload.of(parts.decoder, parts.config, parts.layout, micro_batches, parts.world.device.type)
    rows = [*plan.traffic(work), traffic(parts.decoder, len(parts.source.types), parts.layout)]
    return plan.memory(work), add_up(rows, parts.layout)


def traffic(decoder: DecoderConfig, types: int, layout: Layout) -> Collectives:
    """The one all-reduce of a step: the gradients' norm, losses and counts by dataset type, the routers' sums, ``Shared``."""
    shared = len(fields(Shared)) - 1 + layout.world
    return Collectives("all-reduce", "world", 1, 8 * (1 + 2 * types + RouterSums.size(decoder) + shared))


def clip_factor(norm: float, limit: float) -> float:
    """Factor that brings gradients of global L2 norm ``norm`` down to ``limit``, as ``clip_grad_norm_`` does; 0: no limit."""
    return min(1.0, limit / (norm + 1e-6)) if limit > 0 else 1.0


def over_ranks(*parts: Tensor) -> list[Tensor]:
    """Vectors of fp64 summed over all ranks, in one all-reduce."""
    packed = torch.cat(parts)
    dist.all_reduce(packed)
    return list(packed.split([part.numel() for part in parts]))


def evaluate(parts: Parts, batches: Iterable[MicroBatch], types: int) -> Losses:
    """Losses over all ranks' validation batches; every rank must have equally many."""
    losses = Losses.zeros(types, parts.world.device)
    parts.schedule.evaluate(batches, lambda micro_batch, loss: losses.add(loss.losses, micro_batch))
    sums, counts = over_ranks(losses.sums, losses.counts)
    return Losses(sums, counts / parts.layout.tensor)
