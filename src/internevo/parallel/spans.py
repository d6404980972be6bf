"""What a pipeline rank does and when: its passes, the messages that it sends, and its waiting for messages of others.

PyTorch's profiler shows the same under the names "pipeline KIND stage S micro-batch N". But on a GPU it does not know which
kernels belong to a backward pass, and the times of several ranks would have to be picked from large files.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal, NamedTuple

import torch
from torch.profiler import record_function

from .orders import Action

SEND: Literal["send"] = "send"
WAIT: Literal["wait"] = "wait"


Time = float | torch.cuda.Event
Mark = tuple[str, Action, Time, Time]


class Span(NamedTuple):
    """Something that a rank does. It does one thing at a time."""

    kind: str
    """F, B or W: it runs the pass; send: it sends the result of the pass; wait: it waits for the result."""
    action: Action
    """The pass."""
    start: float
    """Unix time."""
    end: float


class Spans:
    """Records what a rank does. On a GPU, the times are those at which its stream begins and ends to do it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._marks: list[Mark] | None = None

    def __call__(self, kind: str, action: Action) -> AbstractContextManager[None]:
        """The context of a pass, or of a message with the result of a pass."""
        return nullcontext() if self._marks is None else self._span(kind, action, self._marks)

    @contextmanager
    def _span(self, kind: str, action: Action, marks: list[Mark]) -> Iterator[None]:
        with record_function(f"pipeline {kind} stage {action.stage} micro-batch {action.micro_batch}"):
            start = self._now()
            yield
            marks.append((kind, action, start, self._now()))

    @contextmanager
    def record(self) -> Iterator[list[Span]]:
        """Records in this context. The list is filled at its end."""
        spans, origin, self._marks = list[Span](), self._now(), []
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        zero = time.time()
        try:
            yield spans
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)

            def seconds(mark: Time) -> float:
                if isinstance(mark, float):
                    return mark
                assert isinstance(origin, torch.cuda.Event)
                return zero + origin.elapsed_time(mark) / 1e3

            spans += [Span(kind, action, seconds(start), seconds(end)) for kind, action, start, end in self._marks]
        finally:
            self._marks = None

    def _now(self) -> Time:
        if self.device.type != "cuda":
            return time.time()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event
