"""Finds the fastest layouts that fit, among all that are legal.

It refines choices in the order of a lower bound of the time of a step, so that what is found first is fastest:

| a node says                                | its bound                                                           |
|--------------------------------------------|---------------------------------------------------------------------|
| pipeline, schedule, chunks, tensor mode,   | what a rank computes, waits for and reduces (``Search.bound``)      |
| weight, expert, micro-batch                |                                                                     |
| in addition expert weight, FSDP, the least | all but the communication of the optimizer state (``step.at_least``)|
| recomputation with which it may fit        |                                                                     |
| in addition zero                           | the prediction; then it is known whether it fits                    |

Of a layout that does not fit, layers are recomputed until it does: all of these layers or all but the output of the attention
kernel, or the attention of every layer; the fewest that are enough.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate, count, product
from typing import Any, Literal, NamedTuple

from ..config import Config
from ..models.config import DecoderConfig, Stage
from ..parallel.layout import Layout
from ..parallel.orders import rank_of
from . import links, memory, step
from .calibration import Calibration
from .choice import Choice, divisors, is_legal, shapes
from .hardware import GPU, TERA
from .job import Job
from .links import Group
from .memory import RankMemory
from .step import Prediction, StageSeconds


@dataclass(frozen=True)
class Candidate:
    """A layout with what is predicted for it."""

    choice: Choice
    job: Job
    prediction: Prediction
    memory: RankMemory


Node = tuple[float, Literal["shape", "sharding", "layout", "fits"], Choice]
"""A lower bound of the time of a step, what a choice is, and the choice."""


class Times(NamedTuple):
    """Times of the layers before each layer, added up."""

    forward: list[float]
    """Of the forward passes, at least."""
    all: list[float]
    """Of all passes."""
    ends: tuple[float, float]
    """What the embedding and the head take in all passes."""


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
        trivial = Choice().apply(self.config, self.rows)
        base = Job.from_config(self.decoder, trivial, Layout.from_config(trivial, 1), self.rows)
        self.base = replace(base, imbalance=self.imbalance)
        self._times = cache(self._times_of)
        self._stages = cache(self._stages_of)
        self._reduction = cache(self._reduction_of)
        without = replace(self.decoder, experts=None, intermediate_size=0) if self.decoder.experts else self.decoder
        layers = [without.layer_parameters(number) for number in range(self.decoder.num_layers)]
        self._dense = list(accumulate(layers, initial=0))  # parameters of the layers before each, without experts
        e = self.decoder.experts
        size = 3 * self.decoder.hidden_size * e.size * e.count if e else 0
        sparse = (size * self.decoder.is_sparse(number) for number in range(self.decoder.num_layers))
        self._routed = list(accumulate(sparse, initial=0))  # the same of experts

    def best(self, number: int) -> list[Candidate]:
        """Returns the fastest layouts that fit, the fastest first."""
        serial, found = count(), list[Candidate]()
        steps = {"shape": self._shardings, "sharding": self._zeros, "layout": self._recomputed}
        heap = [(self.bound(shape), next(serial), "shape", shape) for shape in shapes(self.config, self.world, self.rows)]
        heapq.heapify(heap)
        while heap and len(found) < number:
            _, _, kind, choice = heapq.heappop(heap)
            if kind == "fits" or (kind == "layout" and self.fits(choice)):
                found.append(self.predict(choice))
            else:
                for bound, new, refined in steps[kind](choice):
                    heapq.heappush(heap, (bound, next(serial), new, refined))
        return found

    def _shardings(self, shape: Choice) -> Iterator[Node]:
        ranks = self.world // shape.pipeline
        of_experts = divisors(ranks) if shape.mode == "isp" and self.decoder.experts else [1]
        for fsdp, expert_weight in product((False, True), of_experts):
            choice = replace(shape, fsdp=fsdp, expert_weight=expert_weight)
            for option in self.fitting(choice) if self.is_legal(choice) else ():
                yield step.at_least(self.job(option), self.gpu, self.calibration), "sharding", option

    def _zeros(self, sharding: Choice) -> Iterator[Node]:
        outer = self.world // (sharding.pipeline * (sharding.weight if sharding.mode == "isp" else sharding.tensor))
        for zero in divisors(outer):
            if self.is_legal(choice := replace(sharding, zero=zero)):
                yield self.seconds(choice), "layout", choice

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
        config = choice.apply(self.config, self.rows)
        layout = Layout.from_config(config, self.world)
        work = replace(
            self.base.work, layout=layout, tokens=config.data.seq_len * choice.micro_bsz,
            micro_batches=self.rows // (choice.micro_bsz * layout.data), recomputed=config.model.checkpoint,
            keeps_attention=choice.selective, rows=0 if config.data.use_packed_dataset else choice.micro_bsz,
            prefetches=config.parallel.weight.overlap, prefetches_experts=config.parallel.expert_weight.overlap,
        )  # fmt: skip
        zero = config.hybrid_zero_optimizer
        layers = tuple(len(stage.layers) for stage in self._stages(layout.stages)) if layout.pipeline > 1 else ()
        return replace(
            self.base, work=work, layers=layers, overlaps_gradients=layout.fsdp or zero.overlap_sync_grad,
            overlaps_weights=layout.fsdp or zero.overlap_sync_param, prefetches=config.parallel.weight.overlap,
        )  # fmt: skip

    def seconds(self, choice: Choice) -> float:
        """Returns the predicted time of a step."""
        return step.predict(self.job(choice), self.gpu, self.calibration).step

    def predict(self, choice: Choice) -> Candidate:
        """Returns a layout with its prediction."""
        job = self.job(choice)
        return Candidate(choice, job, step.predict(job, self.gpu, self.calibration), memory.most_loaded(job))

    def least(self) -> Candidate | None:
        """Returns the layout that needs the least memory, of those with one micro-batch of one row at a time per stage, all
        layers recomputed, and optimizer state over as many ranks as possible; None if no layout is legal."""
        found = list[Candidate]()
        for shape in shapes(self.config, self.world, self.rows):
            if shape.micro_bsz == shape.chunks == 1 and shape.schedule == "1F1B":
                for fsdp in (False, True):
                    choice = replace(shape, fsdp=fsdp, checkpoint=1.0)
                    if self.is_legal(choice):
                        found.append(self.predict(choice))
        return min(found, key=lambda candidate: candidate.memory.total, default=None)

    # Memory ----------------------------------------------------------------------------------------------------------

    def fits(self, choice: Choice) -> bool:
        """Whether a layout fits."""
        return self._fits(self.job(choice), choice)

    def fitting(self, choice: Choice) -> list[Choice]:
        """Returns a layout with the least recomputation of each kind with which it fits; without any, if it does."""
        choice = replace(choice, checkpoint=0.0, selective=False)
        job = self.job(choice)
        if self._fits(job, choice):
            return [choice]
        if not self._fits(job, replace(choice, checkpoint=1.0)):
            return []
        attention = [replace(choice, checkpoint="attention", selective=selective) for selective in (True, False)]
        found, layers = [option for option in attention if self._fits(job, option)], max(len(s.layers) for s in job.stages())
        for selective in (True, False):
            shares = [replace(choice, checkpoint=share(n, layers), selective=selective) for n in range(1, layers + 1)]
            found += shares[bisect_left(shares, True, key=lambda option: self._fits(job, option)) :][:1]
        return found

    def _fits(self, job: Job, choice: Choice) -> bool:
        job = replace(job, work=replace(job.work, recomputed=choice.checkpoint, keeps_attention=choice.selective))
        return memory.most_loaded(job, self.limit).total <= self.limit

    # Bounds ----------------------------------------------------------------------------------------------------------

    def bound(self, choice: Choice) -> float:
        """Returns a time that no step is shorter than, whatever the ranks that weights are sharded over."""
        ranks, whole = choice.pipeline, choice.schedule == "1F1B"
        key = replace(
            choice, pipeline=1, schedule="1F1B", chunks=1, weight=1, expert_weight=1, fsdp=False, zero=-1, checkpoint=0.0
        )
        again = plain = self._times(replace(key, checkpoint="attention" if choice.checkpoint == "attention" else 0.0))
        if not isinstance(choice.checkpoint, str) and choice.checkpoint > 0:
            again = self._times(replace(key, checkpoint=1.0))
        busy, backward, dense, routed, way = [0.0] * ranks, [0.0] * ranks, [0] * ranks, [0] * ranks, 0.0
        for number, stage in enumerate(self._stages(ranks * choice.chunks)):
            rank, first, end = rank_of(number, ranks, choice.schedule), stage.layers.start, stage.layers.stop
            some = first + (0 if isinstance(choice.checkpoint, str) else int((end - first) * choice.checkpoint))
            everything = again.all[some] - again.all[first] + plain.all[end] - plain.all[some]
            everything += stage.embeds * plain.ends[0] + stage.heads * plain.ends[1]
            forward = plain.forward[end] - plain.forward[first]
            busy[rank] += everything
            backward[rank] += everything - forward
            dense[rank] += self._dense[end] - self._dense[first]
            routed[rank] += self._routed[end] - self._routed[first]
            if number < ranks - 1:
                way += everything if whole else forward
        micro_batches = self.rows * choice.tensor * ranks // (self.world * choice.micro_bsz)
        reduced = self._exposed(choice, dense, routed, backward, micro_batches)
        longest = max(micro_batches * time + after for time, after in zip(busy, reduced, strict=True))
        return max(longest, way + micro_batches * busy[-1] + reduced[-1]) + self.calibration.step

    def _exposed(
        self, choice: Choice, dense: list[int], routed: list[int], backward: list[float], micro_batches: int
    ) -> list[float]:
        """Returns at least how long each pipeline rank waits until its gradients are reduced.

        Args:
            dense, routed: its numbers of parameters, outside of experts and of experts.
            backward: the time of its backward passes of a micro-batch.
        """
        world, isp = self.world // choice.pipeline, choice.mode == "isp"
        inner = choice.weight if isp else choice.tensor
        # isp reduces a part over the expert weight axis, in each micro-batch: as if all ranks with these experts reduced them.
        of_experts = choice.expert * (1 if isp or choice.no_tp else choice.tensor)
        rates = [self._reduction(Group(world // n, n)) * self.base.work.gradient_bytes / n for n in (inner, of_experts)]
        found = []
        for plain, more, hides in zip(dense, routed, backward, strict=True):
            without, both = rates[0] * plain, rates[0] * plain + rates[1] * more
            passes = micro_batches + 1 if isp else 1
            waits = [step.exposed(without, hides, self.calibration), step.exposed(both, hides * passes, self.calibration)]
            found.append(max(waits))
        return found

    def _reduction_of(self, group: Group) -> float:
        """Returns the seconds per byte of a reduction over a group, without latencies."""
        return links.seconds("reduce-scatter", step.NO_LATENCY, TERA, group, self.gpu, self.calibration) / TERA

    def _times_of(self, choice: Choice) -> Times:
        """Returns the times of the layers of a model that is no pipeline."""
        job = self.job(choice)

        @cache
        def floor(*stage: Any) -> StageSeconds:
            return step.floor(job, Stage(*stage), self.gpu, self.calibration)

        decoder = self.decoder
        kinds = [(decoder.is_sparse(number), decoder.window(number)) for number in range(decoder.num_layers)]
        first = [kinds.index(kind) for kind in kinds]
        layers = [floor(range(number, number + 1), False, False) for number in first]
        ends = [floor(range(0), embeds, not embeds) for embeds in (True, False)]
        # Layers with experts share an all-reduce, so that several of them take less than each alone.
        sparse = [decoder.is_sparse(number) for number in range(decoder.num_layers)]
        together = _all(floor(range(decoder.num_layers), False, False))
        shared = (sum(map(_all, layers)) - together) / max(1, sum(sparse) - 1)
        forward = accumulate((times.forward - times.exposed for times in layers), initial=0.0)
        everything = (_all(times) - shared * has for times, has in zip(layers, sparse, strict=True))
        return Times(list(forward), list(accumulate(everything, initial=0.0)), (_all(ends[0]), _all(ends[1])))

    def _stages_of(self, number: int) -> tuple[Stage, ...]:
        layout = replace(self.base.work.layout, world=number, pipeline=number)
        return replace(self.base, work=replace(self.base.work, layout=layout)).stages()


def _all(times: StageSeconds) -> float:
    return times.forward + times.backward + times.weights


def share(number: int, layers: int) -> float:
    """Returns the smallest share in thousandths that is ``number`` of ``layers``."""
    thousandths = -(-1000 * number // layers)
    while int(layers * (thousandths / 1000)) < number:
        thousandths += 1
    return thousandths / 1000
