"""Lower bounds of the time and of the memory of layouts of which something is not decided yet.

No bound is more than what ``step`` and ``memory`` say of any layout that can follow. What is not decided costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, lru_cache
from typing import Literal, NamedTuple

import numpy as np

from ..models.config import Stage
from ..parallel.orders import BACKWARD, FORWARD, interleaved, one_f_one_b
from . import counts, links, peak, step, timing
from .calibration import Calibration
from .choice import Choice, Schedule
from .costs import NOTHING, Costs, CostTable, Division, Key, Numbers, Recomputation, gathering, key_of, routed_parameters
from .hardware import GPU, TERA
from .job import Job
from .links import Group

KINDS = (Recomputation("attention", True), Recomputation("attention"), Recomputation("layer", True), Recomputation("layer"))
"""What can be recomputed."""


class First(NamedTuple):
    """The first rank of a pipeline, and the largest stage of all."""

    stages: Division
    largest: int
    """Number of its layers."""
    dense: int
    """Parameters of the layers of the first rank, without those of experts, before anything shards them."""
    routed: int
    """Those of experts."""
    kinds: frozenset[int]
    """The first layer of each kind that it has."""


class Bounds:
    """Lower bounds for a model on a number of GPUs.

    Args:
        base: the job on one GPU.
        rows: of the global batch.
        limit: bytes that a rank may have.
        job: returns the job of a layout.
    """

    def __init__(
        self, base: Job, world: int, rows: int, gpu: GPU, calibration: Calibration, limit: int, job: Callable[[Choice], Job]
    ) -> None:
        self.base, self.world, self.rows, self.limit, self.job = base, world, rows, limit, job
        self.gpu, self.calibration = gpu, calibration
        self.table = CostTable(base, gpu, calibration, job)
        self._divided, self._first, self._shares = cache(self._division), cache(self._first_of), cache(_shares)
        self._link, self._temporary, self._costs = cache(self._link_of), cache(self._temporary_of), cache(self._costs_of)
        self._hops, self._keeps = cache(self._hops_of), cache(self._keeps_of)

    # Time ------------------------------------------------------------------------------------------------------------

    def of_axes(self, choice: Choice) -> float:
        """Returns a bound for layouts with these pipeline, tensor and expert axes, and micro-batches of at most this size."""
        whole = self.table.costs(key_of(choice), self.division(Choice()), NOTHING, 0.0)
        forward, backward, weights, _ = self._passes(whole, [choice], weights_decided=False)
        everything = float((forward + backward + weights)[0, 0])
        return everything * self.micro_batches(choice) / choice.pipeline + self.calibration.step

    def of_schedule(self, choice: Choice) -> float:
        """Returns a bound for layouts with any weight and expert weight axes (here 1), FSDP, ZeRO, and more recomputation."""
        return self._of_schedules([choice], weights_decided=False)[0]

    def of_weights(self, choices: Sequence[Choice]) -> list[float]:
        """Returns a bound for layouts of which ZeRO and more recomputation are not decided, for each of these choices.

        Args:
            choices: they differ only in the weight and expert weight axes and FSDP, so that most is computed once for all.
        """
        return self._of_schedules(choices, weights_decided=True)

    def _of_schedules(self, choices: Sequence[Choice], *, weights_decided: bool) -> list[float]:
        choice = choices[0]
        ranks, number, stages_of = choice.pipeline, self.micro_batches(choice), self.division(choice).by_rank()
        forward, backward, weights, waited = self._stage_passes(choices, weights_decided=weights_decided)
        passes = forward + backward
        busy, after = ((passes + weights)[:, stages_of].sum(axis=1), waited[:, stages_of].sum(axis=1))
        # A micro-batch comes to a stage through all stages before it, and its gradients go back through them.
        way = passes.cumsum(axis=1) - passes
        before = way if choice.schedule == "1F1B" else forward.cumsum(axis=1) - forward  # gradients of weights may come last
        of_ranks, of_stages = before[:, :ranks] + number * busy + after, way + number * passes
        longest: Numbers = np.maximum(of_ranks.max(axis=1), of_stages.max(axis=1)) + self.calibration.step
        bounds: list[float] = longest.tolist()
        return bounds

    def of_memory(self, choice: Choice) -> float:
        """Returns the same bound of one choice, closer and later: the schedule is played out."""
        forward, backward, weights, waited = self._stage_passes([choice], weights_decided=True)
        times: list[float] = np.stack([forward[0], backward[0], weights], axis=1).ravel().tolist()
        hops, number = self._hops(key_of(choice), choice.pipeline), self.micro_batches(choice)
        passes = timing.seconds(choice.schedule, choice.pipeline, choice.chunks, number, times, hops)
        after = waited[0, self.division(choice).by_rank()].sum(axis=0).max()
        return passes + float(after) + self.calibration.step

    def _stage_passes(self, choices: Sequence[Choice], *, weights_decided: bool) -> tuple[Numbers, Numbers, Numbers, Numbers]:
        choice = choices[0]
        again, part = Recomputation.of(choice), 1.0 if isinstance(choice.checkpoint, str) else choice.checkpoint
        costs = self._costs(key_of(choice), choice.stages, again, part)
        return self._passes(costs, choices, weights_decided=weights_decided)

    def _hops_of(self, key: Key, pipeline: int) -> timing.Hops:
        message = counts.message_of(self.job(key.choice()._replace(pipeline=pipeline)))
        return step.hops_of(message, self.gpu, self.calibration)

    def _costs_of(self, key: Key, stages: tuple[int, int, Schedule], again: Recomputation, part: float) -> Costs:
        return self.table.costs(key, self._divided(*stages), again, part)

    def _passes(
        self, costs: Costs, choices: Sequence[Choice], *, weights_decided: bool
    ) -> tuple[Numbers, Numbers, Numbers, Numbers]:
        """Returns the seconds of a forward pass, of a backward pass, of gradients of weights if the schedule computes them
        apart, and at least how long each stage waits at the end of a step until its gradients are reduced: arrays [choices,
        stages], with one row in place of many that are the same; the third is [stages]."""
        weight, experts = [Group(c.weight, 1) for c in choices], [Group(c.expert_weight, 1) for c in choices]
        gathered = self._seconds("all-gather", weight, costs.gathers, costs.gathered)
        gathered = gathered + self._seconds("all-gather", experts, costs.expert_gathers, costs.expert_gathered)
        reduced = self._seconds("reduce-scatter", weight, costs.reductions, costs.reduced)
        reduced = reduced + self._seconds("reduce-scatter", experts, costs.expert_reductions, costs.expert_reduced)
        exchanges = [Group(c.expert, c.expert_inner) for c in choices]
        waited = costs.waited + self._seconds("all-to-all", exchanges, costs.exchanges, costs.exchanged)
        apart, fsdp = choices[0].schedule != "1F1B", np.array([[c.fsdp] for c in choices])
        known = weights_decided or choices[0].mode != "isp"
        gradients = self._gradients(costs, choices) if known else np.zeros((1, 1))
        repeats = np.divide(costs.again, costs.forward, out=np.zeros_like(costs.again), where=costs.forward > 0)
        waited_forward = waited / (2 + repeats)
        computed = costs.inputs + costs.again + (0.0 if apart else costs.weights)
        forward = costs.forward + waited_forward + self._exposed(gathered / 2, costs.forward)
        beside = gathered / 2 + reduced + gradients * fsdp
        backward = computed + waited - waited_forward + self._exposed(beside, computed)
        once = self._exposed(gradients * ~fsdp, computed * self.base.overlaps_gradients)
        return forward, backward, costs.weights * apart, once

    def _exposed(self, communication: Numbers, computation: Numbers) -> Numbers:
        """As ``step.exposed``, if all of it runs at the same time."""
        hidden: Numbers = np.minimum(communication, computation)
        return communication - self.calibration.overlap * hidden

    def _gradients(self, costs: Costs, choices: Sequence[Choice]) -> Numbers:
        """Returns the seconds in which all ranks with the same gradients reduce them, without latencies."""
        ranks = self.world // choices[0].pipeline

        def of_element(parts: int) -> float:
            return self._link("reduce-scatter", Group(ranks // parts, parts))[1] / parts

        dense = np.array([[of_element(c.inner)] for c in choices])
        routed = np.array([[of_element(c.expert * c.expert_inner)] for c in choices])
        return (costs.dense * dense + costs.routed * routed) * self.base.work.gradient_bytes

    def _seconds(self, kind: str, groups: Sequence[Group], count: Numbers, nbytes: Numbers) -> Numbers:
        if all(group.size == 1 for group in groups):
            return np.zeros((1, 1))
        once, per_byte = np.array([self._link(kind, group) for group in groups]).T[:, :, None]
        return count * once + nbytes * per_byte

    def _link_of(self, kind: str, group: Group) -> tuple[float, float]:
        """Returns the seconds of a collective besides its bytes, and those of a byte."""
        latency = links.seconds(kind, 1.0, 0.0, group, self.gpu, self.calibration)
        return latency, links.seconds(kind, step.NO_LATENCY, TERA, group, self.gpu, self.calibration) / TERA

    def micro_batches(self, choice: Choice) -> int:
        """Returns the number of micro-batches of a step on a data rank."""
        return self.rows * choice.tensor * choice.pipeline // (self.world * choice.micro_bsz)

    def division(self, choice: Choice) -> Division:
        """Returns the stages of a layout."""
        return self._divided(*choice.stages)

    def _division(self, pipeline: int, chunks: int, schedule: str) -> Division:
        layout = replace(self.base.work.layout, world=pipeline, pipeline=pipeline, chunks=chunks)
        stages = replace(self.base, work=replace(self.base.work, layout=layout)).stages()
        return Division.of(stages, pipeline, schedule)

    # Memory ----------------------------------------------------------------------------------------------------------

    def least(self, choice: Choice, again: Recomputation) -> Choice | None:
        """Returns a layout with the least recomputation of a kind with which it may fit; None, if it does not fit."""
        fits = np.flatnonzero(self.needs(choice, again) <= self.limit)
        if not len(fits):
            return None
        part = float(self.parts(choice, again)[fits[0]])
        return choice._replace(checkpoint="attention" if again.what == "attention" else part, selective=again.keeps_attention)

    def needs(self, choice: Choice, again: Recomputation) -> Numbers:
        """Returns bytes that the first rank of a pipeline needs at least, whatever the ranks of the ZeRO axes: for each share
        of recomputed layers of ``parts``."""
        key, first, number = key_of(choice), self._first(*choice.stages), self.micro_batches(choice)
        most, later = self._keeps(key, choice.stages, number, again, choice.expert_weight > 1)
        work, ranks, parts = self.base.work, self.world // choice.pipeline, choice.expert * choice.expert_inner
        elements, shards = first.dense / choice.inner + first.routed / parts, (first.dense + first.routed) / ranks
        computed = 0 if work.element_bytes == 4 and ranks == 1 else work.element_bytes  # then the masters are the weights
        weights, gradients = (0.0, 4 * shards) if choice.fsdp else (computed * elements, work.gradient_bytes * elements)
        if choice.schedule != "1F1B":
            gradients = 0.0  # some are computed later
        if later is not None:
            most = np.maximum(most, later + gradients)
        gathers = choice.weight if choice.fsdp else 0
        plain, head = self._temporary(key, first.kinds, gathers, 0.0)
        repeated, _ = self._temporary(key, first.kinds, gathers, again.checkpoint)
        temporary = max(0, plain - head * bool(first.stages.heads.any()))  # freed before the layers' backward passes
        # If some layers are not recomputed, those are the last, and what they keep is freed before others are recomputed.
        return 12 * shards + weights + most + temporary + (repeated - plain) * (self.parts(choice, again) >= 1)

    def _keeps_of(
        self, key: Key, stages: tuple[int, int, Schedule], micro_batches: int, again: Recomputation, gathers: bool
    ) -> tuple[Numbers, Numbers | None]:
        """Returns the bytes of activations that the first rank of a pipeline has at the two moments of ``fullest``, for each
        share of recomputed layers.

        Args:
            gathers: whether isp gathers the weights of experts.
        """
        pipeline, chunks, schedule = stages
        shares = self.parts(Choice(pipeline=pipeline, chunks=chunks, schedule=schedule), again)
        kept = self.table.kept(key, self._first(*stages).stages, again, shares, gathers)
        before, later = fullest(schedule, pipeline, chunks, micro_batches)
        return before @ kept, None if later is None else later @ kept

    def parts(self, choice: Choice, again: Recomputation) -> Numbers:
        """Returns the shares of recomputed layers that make a difference, in ascending order."""
        if again.what != "layer":
            return np.array([float(again.what == "attention")])
        return self._shares(self._first(*choice.stages).largest)

    def _first_of(self, pipeline: int, chunks: int, schedule: str) -> First:
        division, decoder = self._divided(pipeline, chunks, schedule), self.base.work.decoder
        stages = division.on(0)
        pairs = zip(stages.starts.tolist(), stages.stops.tolist(), strict=True)
        layers = [layer for start, stop in pairs for layer in range(start, stop)]
        routed = sum(routed_parameters(decoder, layer) for layer in layers)
        dense = sum(decoder.layer_parameters(layer) for layer in layers) - routed
        kinds = frozenset(self.table.like[layer] for layer in layers)
        return First(stages, int((division.stops - division.starts).max()), dense, routed, kinds)

    def _temporary_of(
        self, key: Key, layers: frozenset[int], gathers: int, recomputed: float | Literal["attention"]
    ) -> tuple[int, int]:
        """Returns bytes of temporary buffers that a rank with such layers has at least, and what a head keeps.

        Args:
            gathers: with FSDP, the ranks of the weight axis; otherwise 0.
            recomputed: as in ``Workload``.
        """
        work = self.job(key.choice()).work
        layout = replace(work.layout, fsdp=gathers > 0, weight=max(1, gathers))
        work = replace(work, layout=layout, recomputed=recomputed)
        both = (work, gathering(work)) if key.mode == "isp" else (work,)
        ones = [replace(one, stages=(Stage(range(n, n + 1), False, False),)) for one in both for n in layers]
        return min(peak.least(one, one.kinds[0]) for one in ones), peak.head(work)


@lru_cache(maxsize=4096)
def fullest(schedule: str, ranks: int, chunks: int, micro_batches: int) -> tuple[Numbers, Numbers | None]:
    """Returns, for each stage on the first rank, of how many forward passes it keeps the activations when they are most: before
    its first backward pass; and after a backward pass through each stage, but the last of none. (The latter is None if there is
    no such moment, or with a schedule for which it is not worth to know.)"""
    if schedule == "ZBV":  # its first micro-batch is back after 2 * ranks - 1 passes through its other stage
        return np.array([min(micro_batches, 2 * ranks - 1), 1.0]), None
    order = one_f_one_b(0, ranks, micro_batches) if chunks == 1 else interleaved(0, ranks, chunks, micro_batches)
    kept, back = dict.fromkeys(range(0, ranks * chunks, ranks), 0), dict.fromkeys(range(0, ranks * chunks, ranks), 0)
    found = dict[bool, list[int]]()
    for action in order:
        kept[action.stage] += 1 if action.kind == FORWARD else -1
        back[action.stage] += action.kind == BACKWARD
        counts, begun = list(kept.values()), [0 < number < micro_batches for number in back.values()]
        if action.kind == FORWARD and (all(begun) or not any(back.values())):
            found[all(begun)] = max(found.get(all(begun), counts), counts, key=sum)
    later = found.get(True)
    return np.array(found[False], dtype=float), None if later is None else np.array(later, dtype=float)


def _shares(layers: int) -> Numbers:
    return np.array([share(number, layers) for number in range(1, layers + 1)])


def share(number: int, layers: int) -> float:
    """Returns the smallest share in thousandths that is ``number`` of ``layers``."""
    thousandths = -(-1000 * number // layers)
    while int(layers * (thousandths / 1000)) < number:
        thousandths += 1
    return thousandths / 1000
