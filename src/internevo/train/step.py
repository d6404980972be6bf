"""One optimizer step, the same for every layout: forward and backward of each micro-batch, one reduction of all that the
step must know, clipping, update."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..data.batches import MicroBatch, StepBatch
from ..models.decoder import Decoder
from ..models.losses import LossTerms
from ..parallel.data_axis import DataAxis
from ..parallel.layout import Layout
from .optimizer import Optimizer
from .routing import RouterSums
from .scaler import LossScaler


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
    shared: list[float]
    """Sums over all ranks of what each put in."""
    routing: dict[str, Any] | None = None
    """What the routers did, in a model with experts."""


@dataclass
class Stepper:
    """Takes steps with a model spread over ranks."""

    model: Decoder
    axis: DataAxis
    optimizer: Optimizer
    scaler: LossScaler
    layout: Layout
    group: dist.ProcessGroup
    """All ranks."""
    device: torch.device
    types: int
    clip: float
    terms: LossTerms

    def __post_init__(self) -> None:
        self.copies = {name: self.axis.copies(name) for name in self.axis.masters}

    def __call__(self, batch: StepBatch, lr: float, beta2: float, share: Callable[[], list[float]]) -> StepResult:
        """Trains on one batch. ``share`` is asked for numbers to add up over all ranks, on the way with the losses."""
        # Gradients are those of the sum of losses over a fixed number; the true number of predicted tokens is known when
        # all ranks have been asked, and enters with the clipping.
        expected = float(batch.tokens)
        losses, routed = self._forward_backward(batch, self.scaler.scale / expected)
        result, to_mean = self._reduce(losses, routed, expected / self.scaler.scale, share())
        if not result.skipped:
            factor = to_mean
            if self.clip > 0:
                factor *= min(1.0, self.clip / (result.grad_norm + 1e-6))
            torch._foreach_mul_(list(self.optimizer.gradients().values()), factor)
            self.optimizer.step(lr, beta2)
            self.axis.masters_changed()
        self.optimizer.zero_grad()
        self.scaler.update(result.skipped)
        return result

    def _forward_backward(self, batch: StepBatch, scale: float) -> tuple[Losses, RouterSums]:
        losses, routed = Losses.zeros(self.types, self.device), RouterSums(self.model.config, self.device)
        for number, micro in enumerate(batch.micro_batches, start=1):
            self.axis.before_micro_batch(last=number == len(batch.micro_batches))
            on_device = micro.to(self.device)
            loss = self.model(on_device.tokens, cu_seqlens=on_device.cu_seqlens, labels=on_device.labels, terms=self.terms)
            (loss.total * scale).backward()
            losses.add(loss.losses, on_device)
            routed.add(loss)
        self.axis.after_backwards()
        return losses, routed

    def _reduce(self, losses: Losses, routed: RouterSums, unscale: float, share: list[float]) -> tuple[StepResult, float]:
        """One all-reduce of everything that all ranks must know. Returns the factor from gradients to those of the mean."""
        gradients = self.optimizer.gradients()
        norms = torch.stack(torch._foreach_norm(list(gradients.values()))).double()
        # Every part counts once, however many ranks hold it.
        copies = torch.tensor([self.copies[name] for name in gradients], dtype=torch.float64, device=self.device)
        squares = (norms.square() / copies).sum()
        shared = torch.tensor(share, dtype=torch.float64, device=self.device)
        parts = [squares.view(1), losses.sums, losses.counts, routed.values, shared]
        packed = torch.cat(parts)
        dist.all_reduce(packed, group=self.group)
        square_sum, sums, counts, routing, shared = packed.split([part.numel() for part in parts])
        counts = counts / self.layout.tensor  # the ranks of a tensor group have counted the same tokens
        predicted = float(counts.sum())
        to_mean = unscale / max(predicted, 1.0)
        norm = float(square_sum.sqrt()) * to_mean
        finite = math.isfinite(norm) and bool(torch.isfinite(sums).all())
        summary = routed.summary(routing, predicted)
        return StepResult(Losses(sums, counts), norm, not finite, shared.tolist(), summary), to_mean


@torch.no_grad()
def evaluate(
    model: Decoder,
    axis: DataAxis,
    batches: Iterable[MicroBatch],
    types: int,
    device: torch.device,
    group: dist.ProcessGroup,
    layout: Layout,
) -> Losses:
    """Losses over all ranks' validation batches; every rank must have equally many."""
    losses = Losses.zeros(types, device)
    model.eval()
    for batch in batches:
        on_device = batch.to(device)
        loss = model(on_device.tokens, cu_seqlens=on_device.cu_seqlens, labels=on_device.labels)
        losses.add(loss.losses, on_device)
    model.train()
    axis.after_forwards()
    packed = torch.cat([losses.sums, losses.counts])
    dist.all_reduce(packed, group=group)
    return Losses(packed[:types], packed[types:] / layout.tensor)
