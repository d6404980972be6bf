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
from ..models.losses import HandedOn, Loss, LossTerms
from .data_axis import DataAxis

OnResult = Callable[[MicroBatch, Loss | HandedOn], None]
"""A function that is called with each micro-batch (on the device) and the result of each stage of this rank: the loss, or what
the stage has handed on."""


class Schedule(Protocol):
    """Runs micro-batches through all stages. All ranks of a pipeline must call its methods in the same order."""

    def train(self, micro_batches: Sequence[MicroBatch], terms: LossTerms, scale: float, on_result: OnResult) -> None:
        """Runs the forward and backward passes of the micro-batches of a step.

        Afterwards the masters have the gradients of the sum of the losses times ``scale``.

        Args:
            terms: weights of the terms of the loss.
        """

    def evaluate(self, micro_batches: Iterable[MicroBatch], on_result: OnResult) -> None:
        """Runs forward passes without gradients."""


class OneStage:
    """The schedule without a pipeline: the whole model is on this rank."""

    def __init__(self, model: Decoder, axis: DataAxis, device: torch.device) -> None:
        self.model, self.axis, self.device = model, axis, device

    def train(self, micro_batches: Sequence[MicroBatch], terms: LossTerms, scale: float, on_result: OnResult) -> None:
        """Runs the micro-batches one after the other."""
        for number, micro_batch in enumerate(micro_batches, start=1):
            on_device = micro_batch.to(self.device)
            loss = self.model(on_device.tokens, cu_seqlens=on_device.cu_seqlens, labels=on_device.labels, terms=terms)
            self.axis.before_backward(last=number == len(micro_batches))
            (loss.total * scale).backward()
            on_result(on_device, loss)
        self.axis.after_backwards()

    @torch.no_grad()
    def evaluate(self, micro_batches: Iterable[MicroBatch], on_result: OnResult) -> None:
        """Runs the forward passes one after the other, in evaluation mode."""
        self.model.eval()
        for micro_batch in micro_batches:
            on_device = micro_batch.to(self.device)
            on_result(on_device, self.model(on_device.tokens, cu_seqlens=on_device.cu_seqlens, labels=on_device.labels))
        self.model.train()
        self.axis.after_forwards()
