"""Schedules: the order in which the micro-batches of a step go through the stages of a model.

| schedule     | stages | order                                                                            |
|--------------|--------|----------------------------------------------------------------------------------|
| ``OneStage`` | 1      | forward and backward pass of one micro-batch, then of the next                   |

The training step and the evaluation only use a schedule, and need not know about stages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch

from ..data.batches import MicroBatch
from ..models.decoder import Decoder
from ..models.losses import Loss, LossTerms
from .data_axis import DataAxis

OnLoss = Callable[[MicroBatch, Loss], None]
"""A function that is called with each micro-batch (on the device) and its loss, on the ranks that compute the loss."""


class Schedule(Protocol):
    """Runs micro-batches through all stages. All ranks of a pipeline must call its methods in the same order."""

    def train(self, micro_batches: Sequence[MicroBatch], terms: LossTerms, scale: float, on_loss: OnLoss) -> None:
        """Runs the forward and backward passes of the micro-batches of a step.

        Afterwards the masters have the gradients of the sum of the losses times ``scale``.

        Args:
            terms: weights of the terms of the loss.
        """

    def evaluate(self, micro_batches: Iterable[MicroBatch], on_loss: OnLoss) -> None:
        """Runs forward passes without gradients."""


class OneStage:
    """The schedule without a pipeline: the whole model is on this rank."""

    def __init__(self, model: Decoder, axis: DataAxis, device: torch.device) -> None:
        self.model, self.axis, self.device = model, axis, device

    def train(self, micro_batches: Sequence[MicroBatch], terms: LossTerms, scale: float, on_loss: OnLoss) -> None:
        """Runs the micro-batches one after the other."""
        for number, micro_batch in enumerate(micro_batches, start=1):
            self.axis.before_micro_batch(last=number == len(micro_batches))
            on_device = micro_batch.to(self.device)
            loss = self.model(on_device.tokens, cu_seqlens=on_device.cu_seqlens, labels=on_device.labels, terms=terms)
            (loss.total * scale).backward()
            on_loss(on_device, loss)
        self.axis.after_backwards()

    @torch.no_grad()
    def evaluate(self, micro_batches: Iterable[MicroBatch], on_loss: OnLoss) -> None:
        """Runs the forward passes one after the other, in evaluation mode."""
        self.model.eval()
        for micro_batch in micro_batches:
            on_device = micro_batch.to(self.device)
            on_loss(on_device, self.model(on_device.tokens, cu_seqlens=on_device.cu_seqlens, labels=on_device.labels))
        self.model.train()
        self.axis.after_forwards()
