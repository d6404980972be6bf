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
from torch import Tensor

from ..data.batches import MicroBatch
from ..models.decoder import Decoder
from ..models.losses import HandedOn, Loss, LossTerms
from .data_axis import DataAxis
from .orders import BACKWARD, FORWARD, Action

OnResult = Callable[[MicroBatch, Loss | HandedOn], None]
"""A function that is called with the result of each stage of this rank, the loss or what the stage has handed on, and with the
micro-batch: on the device, as far as the stage needs it. With a loss, it has its labels and dataset types."""


def nothing(action: Action) -> None:
    """Is called after each pass, if nobody measures."""


class Schedule(Protocol):
    """Runs micro-batches through all stages. All ranks of a pipeline must call its methods in the same order."""

    after_pass: Callable[[Action], None]
    """Is called after each pass of a step. (``monitor.memory`` measures there.)"""

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
        self.after_pass: Callable[[Action], None] = nothing

    def train(self, micro_batches: Sequence[MicroBatch], terms: LossTerms, scale: float, on_result: OnResult) -> None:
        """Runs the micro-batches one after the other."""
        for number, micro_batch in enumerate(micro_batches):
            loss = self._forward(micro_batch, terms, on_result) * scale
            self.after_pass(Action(FORWARD, 0, number))
            self.axis.before_backward(last=number == len(micro_batches) - 1)
            loss.backward()
            self.after_pass(Action(BACKWARD, 0, number))
        self.axis.after_backwards()

    def _forward(self, micro_batch: MicroBatch, terms: LossTerms, on_result: OnResult) -> Tensor:
        """Returns only what the backward pass needs, so that nothing else is kept for it."""
        on_device = micro_batch.to(self.device)
        loss = self.model(on_device.tokens, cu_seqlens=on_device.cu_seqlens, labels=on_device.labels, terms=terms)
        on_result(on_device, loss)
        return loss.total

    @torch.no_grad()
    def evaluate(self, micro_batches: Iterable[MicroBatch], on_result: OnResult) -> None:
        """Runs the forward passes one after the other, in evaluation mode."""
        training = self.model.training
        self.model.eval()
        for micro_batch in micro_batches:
            on_device = micro_batch.to(self.device)
            on_result(on_device, self.model(on_device.tokens, cu_seqlens=on_device.cu_seqlens, labels=on_device.labels))
        self.model.train(training)
        self.axis.after_forwards()
