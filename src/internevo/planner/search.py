"""Finds the fastest layouts that fit, among all that are legal.

It refines choices in the order of a lower bound of the time of a step, so that what is found first is fastest:

| a node says                                                    | its bound                                                |
|----------------------------------------------------------------|----------------------------------------------------------|
| axes: pipeline, tensor mode, expert                            | what a rank computes, with the largest micro-batch       |
| in addition rows: the size of a micro-batch                    | the same                                                 |
| in addition schedule: schedule, chunks                         | what the slowest rank computes and waits for             |
| in addition kind: what is recomputed, if something must be     | the same, with as little of it as may be enough          |
| in addition weights: weight, expert weight, FSDP               | the same, and what it communicates of weights            |
| in addition memory: how much is recomputed, at least           | the same, with the schedule played out                   |
| in addition recomputation: enough, if ZeRO is over all ranks   | all but the communication of the optimizer state         |
| in addition zero                                               | all but the communication of that of experts             |
| in addition expert zero: a layout                              | the prediction; then it is known whether it fits         |

Of a layout that does not fit, layers are recomputed until it does: all of these layers or all but the output of the attention
kernel, or the attention of every layer; the fewest that are enough.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import count
from typing import Literal

from ..config import Config
from ..models.config import DecoderConfig, Stage
from ..parallel.layout import Layout
from . import counts, memory, step
from .bounds import KINDS, Bounds
from .calibration import Calibration
from .choice import Choice, axes, divisors, is_legal, schedules, weights
from .costs import NOTHING, Recomputation
from .hardware import GPU
from .job import Job
from .memory import RankMemory
from .step import Prediction


@dataclass(frozen=True)
class Candidate:
    """A layout with what is predicted for it."""

    choice: Choice
    job: Job
    prediction: Prediction
    memory: RankMemory


Level = Literal["axes", "rows", "schedule", "kind", "weights", "memory", "recomputation", "zero", "layout", "fits"]
Node = tuple[float, Level, Choice]
"""A lower bound of the time of a step, what is decided, and the choice."""


@dataclass
class Search:
    """A search for a config on a number of GPUs."""

    config: Config
    decoder: DecoderConfig
    world: int
    rows: int
    """Of the global batch."""
    gpu: GPU
    calibration: Calibration
    limit: int
    """Bytes that a rank may have."""
    imbalance: float = 1.0
    """As ``Job.imbalance``."""

    def __post_init__(self) -> None:
        self.gpu = self.gpu.in_world(self.world)
        trivial = Choice().apply(self.config, self.rows)
        base = Job.from_config(self.decoder, trivial, Layout.from_config(trivial, 1), self.rows)
        self.base = replace(base, imbalance=self.imbalance)
        self._stages = cache(self._stages_of)
        self._insides = defaultdict[Choice, counts.Insides](dict)
        self.bounds = Bounds(self.base, self.world, self.rows, self.gpu, self.calibration, self.limit, self.job)

    def best(self, number: int) -> list[Candidate]:
        """Returns the fastest layouts that fit, the fastest first."""
        serial, found = count(), list[Candidate]()
        steps: dict[Level, Callable[[Choice], Iterator[Node]]] = {
            "axes": self._rows, "rows": self._schedules, "schedule": self._kinds, "kind": self._weights,
            "weights": self._memory, "memory": self._recomputations, "recomputation": self._zeros, "zero": self._expert_zeros,
            "layout": self._recomputed,
        }  # fmt: skip
        heap = [(bound, next(serial), level, choice) for bound, level, choice in self._axes()]
        heapq.heapify(heap)
        while heap and len(found) < number:
            _, _, level, choice = heapq.heappop(heap)
            if level == "fits" or (level == "layout" and self.fits(choice)):
                found.append(self.predict(choice))
            else:
                for bound, new, refined in steps[level](choice):
                    if bound < float("inf"):
                        heapq.heappush(heap, (bound, next(serial), new, refined))
        return found

    def _axes(self) -> Iterator[Node]:
        for choice in axes(self.config, self.world):
            rows, rest = divmod(self.rows, self.world // (choice.pipeline * choice.tensor))
            if not rest and self.is_legal(choice):
                yield self.bounds.of_axes(choice._replace(micro_bsz=rows)), "axes", choice

    def _rows(self, choice: Choice) -> Iterator[Node]:
        for size in divisors(self.rows // (self.world // (choice.pipeline * choice.tensor))):
            sized = choice._replace(micro_bsz=size)
            if self._may_fit(sized):
                yield self.bounds.of_axes(sized), "rows", sized

    def _schedules(self, choice: Choice) -> Iterator[Node]:
        for schedule, chunks in schedules(choice.pipeline, self.decoder.num_layers):
            option = choice._replace(schedule=schedule, chunks=chunks)
            yield self.bounds.of_schedule(option), "schedule", option

    def _kinds(self, choice: Choice) -> Iterator[Node]:
        """Decides what is recomputed, unless all may fit without."""
        likely = self._of_least_memory(choice)
        for again in (NOTHING, *KINDS):
            found = [option for option in (self.bounds.least(option, again) for option in likely) if option]
            if found:
                part = found[0].checkpoint if again.what == "attention" else min(float(option.checkpoint) for option in found)
                option = choice._replace(checkpoint=part, selective=again.keeps_attention)
                yield self.bounds.of_schedule(option), "kind", option
                if again == NOTHING:
                    return

    def _weights(self, choice: Choice) -> Iterator[Node]:
        options = list(weights(choice, self.config, self.world))
        for bound, option in zip(self.bounds.of_weights(options) if options else (), options, strict=True):
            yield bound, "weights", option

    def _memory(self, choice: Choice) -> Iterator[Node]:
        if self.is_legal(choice):
            enough = self.bounds.least(choice, Recomputation.of(choice))
            again = () if enough or choice.checkpoint else KINDS
            for option in [enough, *(self.bounds.least(choice, kind) for kind in again)]:
                if option is not None:
                    yield self.bounds.of_memory(option), "memory", option

    def _recomputations(self, choice: Choice) -> Iterator[Node]:
        for option in self._enough(choice, Recomputation.of(choice)) if choice.checkpoint else self.fitting(choice):
            seconds = step.at_least(self.job(option), self.gpu, self.calibration, self._inside(option))
            yield seconds, "recomputation", option

    def _zeros(self, choice: Choice) -> Iterator[Node]:
        job, insides = self.job(choice), self._inside(choice)
        layout = job.work.layout
        for zero in divisors(layout.zero * layout.replicate):
            option = choice._replace(zero=zero)
            if layout.experts_apart:
                yield step.at_least(job, self.gpu, self.calibration, insides, zero), "zero", option
            else:
                yield self._seconds(job, insides, (zero, layout.expert_zero)), "layout", option

    def _expert_zeros(self, choice: Choice) -> Iterator[Node]:
        job, insides = self.job(choice), self._inside(choice)
        layout, experts = job.work.layout, job.work.layout.experts.axes
        for zero in divisors(experts["zero"] * experts["replicate"]):
            yield self._seconds(job, insides, (layout.zero, zero)), "layout", choice._replace(expert_zero=zero)

    def _recomputed(self, choice: Choice) -> Iterator[Node]:
        """Yields the same layout with more recomputation, of a kind that is no other node's."""
        for option in self.fitting(choice):
            if choice.checkpoint in (0.0, option.checkpoint) or (
                not isinstance(choice.checkpoint, str)
                and not isinstance(option.checkpoint, str)
                and choice.selective == option.selective
            ):
                yield self.seconds(option), "fits", option

    def is_legal(self, choice: Choice) -> bool:
        """Whether a layout can be trained."""
        return is_legal(choice, self.config, self.rows, self.world)

    def job(self, choice: Choice) -> Job:
        """Returns the step of a layout that can be trained: what ``Job.from_config`` says, sooner."""
        layout, base, zero = choice.layout(self.config, self.world), self.base, self.config.hybrid_zero_optimizer
        work = replace(
            base.work, layout=layout, tokens=base.seq_len * choice.micro_bsz,
            micro_batches=self.rows // (choice.micro_bsz * layout.data), recomputed=choice.checkpoint,
            keeps_attention=choice.selective, rows=0 if self.config.data.use_packed_dataset else choice.micro_bsz,
            prefetches=choice.weight > 1, prefetches_experts=choice.expert_weight > 1,
        )  # fmt: skip
        layers = tuple(len(stage.layers) for stage in self._stages(layout.stages)) if layout.pipeline > 1 else ()
        overlaps = layout.fsdp or zero.overlap_sync_grad, layout.fsdp or zero.overlap_sync_param
        return replace(base, work=work, layers=layers, overlaps_gradients=overlaps[0], overlaps_weights=overlaps[1])

    def seconds(self, choice: Choice) -> float:
        """Returns the predicted time of a step."""
        return self._seconds(self.job(choice), self._inside(choice))

    def _seconds(self, job: Job, insides: counts.Insides, zeros: tuple[int, int] | None = None) -> float:
        return step.timed(counts.count(job, insides, zeros), self.gpu, self.calibration).step

    def _inside(self, choice: Choice) -> counts.Insides:
        """Returns what is known of the layers of a choice with any ranks for the optimizer state."""
        return self._insides[choice._replace(zero=-1, expert_zero=-1)]

    def predict(self, choice: Choice) -> Candidate:
        """Returns a layout with its prediction."""
        job = self.job(choice)
        return Candidate(choice, job, step.predict(job, self.gpu, self.calibration), memory.most_loaded(job))

    def least(self) -> Candidate | None:
        """Returns the layout that needs the least memory, of those with one micro-batch of one row at a time per stage, all
        layers recomputed, and optimizer state over as many ranks as possible; None if no layout is legal."""
        found = list[tuple[float, Choice]]()
        for _, _, choice in self._axes():
            for least in weights(choice._replace(checkpoint=1.0), self.config, self.world):
                found.append((self.bounds.needs(least, Recomputation("layer"))[-1], least))
        best: Candidate | None = None
        for bound, choice in sorted(found, key=lambda pair: pair[0]):
            if best is not None and bound >= best.memory.total:
                break
            if self.is_legal(choice):
                best = min((c for c in (best, self.predict(choice)) if c), key=lambda c: c.memory.total)
        return best

    # Memory ----------------------------------------------------------------------------------------------------------

    def fits(self, choice: Choice) -> bool:
        """Whether a layout fits."""
        return self._fits(self.job(choice), choice)

    def fitting(self, choice: Choice) -> list[Choice]:
        """Returns a layout with the least recomputation of each kind with which it fits; without any, if it does."""
        return self._enough(choice, NOTHING) or [option for again in KINDS for option in self._enough(choice, again)]

    def _enough(self, choice: Choice, again: Recomputation) -> list[Choice]:
        """Returns the layout with the least recomputation of a kind with which it fits, if there is one."""
        least, job = self.bounds.least(choice, again), self.job(choice)
        if least is None or self._fits(job, least):
            return [least] if least else []
        parts = self.bounds.parts(choice, again).tolist() if again.what == "layer" else []
        options = [least._replace(checkpoint=part) for part in parts if part > float(least.checkpoint)]
        place = bisect_left(options, True, key=lambda option: self._fits(job, option))
        return options[place : place + 1]

    def _may_fit(self, choice: Choice) -> bool:
        """Whether a layout may fit with any weight axes, schedule and recomputation."""
        options = schedules(choice.pipeline, self.decoder.num_layers)
        sure = (choice._replace(schedule=schedule, chunks=chunks) for schedule, chunks in options)
        least = (option for scheduled in sure for option in self._of_least_memory(scheduled))
        return any(self.bounds.needs(option, Recomputation("layer"))[-1] <= self.limit for option in least)

    def _of_least_memory(self, choice: Choice) -> list[Choice]:
        """Returns the weight axes and FSDP of which one needs the least memory. (They need not be legal.)"""
        if choice.mode == "isp":
            ranks = self.world // choice.pipeline
            choice = choice._replace(weight=ranks, expert_weight=max(1, ranks // choice.expert))
        return [choice._replace(fsdp=fsdp) for fsdp in (False, True)]

    def _fits(self, job: Job, choice: Choice) -> bool:
        job = replace(job, work=replace(job.work, recomputed=choice.checkpoint, keeps_attention=choice.selective))
        return memory.most_loaded(job, self.limit).total <= self.limit

    def _stages_of(self, number: int) -> tuple[Stage, ...]:
        layout = replace(self.base.work.layout, world=number, pipeline=number)
        return replace(self.base, work=replace(self.base.work, layout=layout)).stages()
