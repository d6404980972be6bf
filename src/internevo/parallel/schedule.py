"""Schedules: how the micro-batches of a step go through the stages of a model.

| schedule   | stages | order                                                                              |
|------------|--------|------------------------------------------------------------------------------------|
| ``OneStage`` | 1    | forward and backward of one micro-batch, then of the next                          |

The training step and the evaluation know nothing else of stages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch

from ..data.batches import MicroBatch
from ..models.decoder import Decoder
from ..models.losses import Loss, LossTerms
from .data_axis import DataAxis

Done = Callable[[MicroBatch, Loss], None]
"""Gets each micro-batch (on the device) with its loss, on the ranks that compute it."""


class Schedule(Protocol):
    """Takes micro-batches through all stages. Every rank of a pipeline calls it alike."""

    def train(self, micro_batches: Sequence[MicroBatch], terms: LossTerms, scale: float, done: Done) -> None:
        """Forward and backward of a step's micro-batches; gradients of the summed losses times ``scale`` are in the masters
        when it returns."""

    def evaluate(self, micro_batches: Iterable[MicroBatch], done: Done) -> None:
        """Forward passes without gradients."""


class OneStage:
    """The whole model is on this rank."""

    def __init__(self, model: Decoder, axis: DataAxis, device: torch.device) -> None:
        self.model, self.axis, self.device = model, axis, device

    def train(self, micro_batches: Sequence[MicroBatch], terms: LossTerms, scale: float, done: Done) -> None:
        """One micro-batch after another; the data axis is told which is the last."""
        for number, micro_batch in enumerate(micro_batches, start=1):
            self.axis.before_micro_batch(last=number == len(micro_batches))
            on_device = micro_batch.to(self.device)
            loss = self.model(on_device.tokens, cu_seqlens=on_device.cu_seqlens, labels=on_device.labels, terms=terms)
            (loss.total * scale).backward()
            done(on_device, loss)
        self.axis.after_backwards()

    @torch.no_grad()
    def evaluate(self, micro_batches: Iterable[MicroBatch], done: Done) -> None:
        """One micro-batch after another, in evaluation mode."""
        self.model.eval()
        for micro_batch in micro_batches:
            on_device = micro_batch.to(self.device)
            done(on_device, self.model(on_device.tokens, cu_seqlens=on_device.cu_seqlens, labels=on_device.labels))
        self.model.train()
        self.axis.after_forwards()
