"""What a micro-batch costs in the stages of a pipeline, as sums over layers: quick for many divisions of layers into stages.

Each kind of layer is counted once for each kind of recomputation. The costs of stages are differences of running totals.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..models.config import DecoderConfig, Stage
from ..parallel import expert, isp, tensor
from ..parallel.memory import activations, tables
from ..parallel.orders import rank_of
from ..parallel.strategy import Collectives, Workload
from . import counts, kernels, step
from .calibration import Calibration
from .choice import Choice, Mode
from .flops import stage as passes_of
from .hardware import GPU
from .job import Job

Numbers = NDArray[np.float64]
CostsOf = Callable[[Job, Stage], list[float]]
"""Returns what one stage costs: ``Costs``, or the bytes that it keeps, which are needed for more kinds of recomputation."""


class Recomputation(NamedTuple):
    """What is recomputed of the layers that are: a kind of ``Choice.checkpoint`` with ``Choice.selective``."""

    what: Literal["nothing", "layer", "attention"]
    keeps_attention: bool = False

    @property
    def checkpoint(self) -> float | Literal["attention"]:
        """``Choice.checkpoint`` for all layers."""
        return "attention" if self.what == "attention" else float(self.what == "layer")

    @classmethod
    def of(cls, choice: Choice) -> Recomputation:
        """Returns what a layout recomputes."""
        if isinstance(choice.checkpoint, str):
            return cls("attention", choice.selective)
        return cls("layer", choice.selective) if choice.checkpoint else NOTHING


NOTHING = Recomputation("nothing")


class Division(NamedTuple):
    """The stages of a pipeline, as arrays with a number for each stage."""

    starts: NDArray[np.int64]
    stops: NDArray[np.int64]
    embeds: NDArray[np.int64]
    heads: NDArray[np.int64]
    ranks: NDArray[np.int64]

    @classmethod
    def of(cls, stages: tuple[Stage, ...], ranks: int, schedule: str) -> Division:
        """Divides layers into these stages, on ``ranks`` ranks."""
        rows = [
            (stage.layers.start, stage.layers.stop, stage.embeds, stage.heads, rank_of(number, ranks, schedule))
            for number, stage in enumerate(stages)
        ]
        return cls(*np.array(rows, dtype=np.int64).T)

    def by_rank(self) -> NDArray[np.int64]:
        """Returns the numbers of the stages of each rank, in ascending order: an array [chunks, ranks]."""
        return np.argsort(self.ranks, kind="stable").reshape(self.ranks.max() + 1, -1).T

    def on(self, rank: int) -> Division:
        """Returns the stages on one rank."""
        return Division(*(numbers[self.ranks == rank] for numbers in self))


class Costs(NamedTuple):
    """What one micro-batch costs in each of several stages."""

    forward: Numbers
    """Seconds of computation in the forward pass."""
    inputs: Numbers
    """Of gradients of inputs."""
    weights: Numbers
    """Of gradients of weights."""
    again: Numbers
    """Of recomputation."""
    waited: Numbers
    """Seconds of collectives that are waited for, without those of experts and weights."""
    exchanges: Numbers
    """Number of all-to-all collectives of experts."""
    exchanged: Numbers
    """Their bytes."""
    gathers: Numbers
    """isp: number of all-gathers of weights, in both passes together."""
    gathered: Numbers
    reductions: Numbers
    """isp: number of reduce-scatters of gradients."""
    reduced: Numbers
    expert_gathers: Numbers
    """The same of the weights of experts."""
    expert_gathered: Numbers
    expert_reductions: Numbers
    expert_reduced: Numbers
    dense: Numbers
    """Parameters of layers without those of experts, before anything shards them."""
    routed: Numbers
    """Parameters of experts."""


class Key(NamedTuple):
    """What the costs of a layer depend on."""

    mode: Mode
    tensor: int
    no_tp: bool
    expert: int
    micro_bsz: int
    context: int

    def choice(self) -> Choice:
        """Returns a layout without pipeline with such layers."""
        return Choice(**self._asdict())


def key_of(choice: Choice) -> Key:
    """Returns what the costs of a layer depend on."""
    return Key(choice.mode, choice.tensor, choice.no_tp, choice.expert, choice.micro_bsz, choice.context)


class CostTable:
    """The costs of the layers of a model.

    Args:
        base: any job of the model.
        job: returns the job of a layout.
    """

    def __init__(self, base: Job, gpu: GPU, calibration: Calibration, job: Callable[[Choice], Job]) -> None:
        self.gpu, self.calibration, self.job = gpu, calibration, job
        self._totals, self._ends = cache(self._totals_of), cache(self._ends_of)
        decoder = base.work.decoder
        kinds = [decoder.kind(number) for number in range(decoder.num_layers)]
        self.like = [kinds.index(kind) for kind in kinds]
        """For each layer the first one of its kind."""

    def costs(self, key: Key, division: Division, again: Recomputation, part: float) -> Costs:
        """Returns the costs of stages.

        Args:
            part: the share of the layers of a stage that are recomputed.
        """
        return Costs(*self._between(self._costs, key, division, again, np.array([part]))[:, :, 0])

    def kept(self, key: Key, division: Division, again: Recomputation, parts: Numbers, gathers: bool) -> Numbers:
        """Returns the bytes that a forward pass through each stage keeps, for several shares of recomputed layers: an array
        [stages, shares]. (``gathers``: whether isp gathers the weights of experts.)"""
        kept, products = self._between(_keeps, key, division, again, parts)
        return kept - products if gathers else kept

    def _between(self, of: CostsOf, key: Key, division: Division, again: Recomputation, parts: Numbers) -> Numbers:
        """Returns costs of stages: an array [costs, stages, shares of recomputed layers]."""
        starts, stops = division.starts[:, None], division.stops[:, None]
        middle = starts + ((stops - starts) * parts).astype(np.int64)
        plain, repeated = self._totals(of, key, NOTHING), self._totals(of, key, again)
        found = repeated[:, middle] - repeated[:, starts] + plain[:, stops] - plain[:, middle]
        outside: Numbers = self._ends(of, key) @ np.stack([division.embeds, division.heads])
        return found + outside[:, :, None]

    def _totals_of(self, of: CostsOf, key: Key, again: Recomputation) -> Numbers:
        """Returns the costs of all layers before each layer: an array [number of costs, layers + 1]."""
        job = self.job(key.choice()._replace(checkpoint=again.checkpoint, selective=again.keeps_attention))
        kinds = {number: of(job, Stage(range(number, number + 1), False, False)) for number in set(self.like)}
        layers = np.array([kinds[number] for number in self.like]).T
        return np.concatenate([np.zeros((len(layers), 1)), layers.cumsum(axis=1)], axis=1)

    def _ends_of(self, of: CostsOf, key: Key) -> Numbers:
        """Returns the costs of the embedding and of the head: an array [number of costs, 2]."""
        job, ends = self.job(key.choice()), (Stage(range(0), True, False), Stage(range(0), False, True))
        return np.array([of(job, stage) for stage in ends]).T

    def _costs(self, job: Job, stage: Stage) -> list[float]:
        work = replace(job.work, stages=(stage,), micro_batches=1)
        passes = passes_of(job, stage.layers, stage.heads)
        forward, inputs, weights, again = (
            kernels.seconds(amounts, self.gpu, self.calibration, job.precision) for amounts in passes
        )
        inside = (isp if work.layout.mode == "isp" else tensor).traffic(work)
        of_experts, groups = expert.traffic(work), counts.groups_of(work.layout)
        waited = [row for row in inside if row.axis != "weight"]
        shared = counts.messages([row for row in of_experts if row.axis == "tensor"], groups)
        # The layers of a stage share one all-reduce, so that its latency is no layer's.
        shared = [row._replace(number=step.NO_LATENCY) if row.kind == "all-reduce" else row for row in shared]
        exchanged = _sums(of_experts, "all-to-all", "expert")
        own, others = ([*_sums(rows, "all-gather"), *_sums(rows, "reduce-scatter")] for rows in (inside, of_experts))
        routed = sum(routed_parameters(work.decoder, layer) for layer in stage.layers)
        total = sum(work.decoder.layer_parameters(layer) for layer in stage.layers)
        return [
            forward, inputs, weights, again,
            step.seconds_of([*counts.messages(waited, groups), *shared], self.gpu, self.calibration),
            *exchanged, *own, *others, total - routed, routed,
        ]  # fmt: skip


def _sums(rows: list[Collectives], kind: str, *axes: str) -> tuple[float, float]:
    """Returns the number and the bytes of collectives of a kind over axes, or over those of weights."""
    found = [row for row in rows if row.kind == kind and row.axis in (axes or ("weight", "expert weight"))]
    return sum(row.count for row in found), sum(row.nbytes for row in found)


def routed_parameters(decoder: DecoderConfig, layer: int) -> int:
    """Returns the number of parameters of the experts of a layer."""
    e = decoder.experts
    return 3 * decoder.hidden_size * e.size * e.count if e is not None and decoder.is_sparse(layer) else 0


def _keeps(job: Job, stage: Stage) -> list[float]:
    """Returns the bytes that a forward pass keeps for a backward pass, and what of them is kept only if the weights of experts
    are not gathered (isp)."""
    work = replace(job.work, stages=(stage,), micro_batches=1)
    kept = _kept(work)
    return [kept, kept - _kept(gathering(work)) if work.layout.mode == "isp" else 0]


def _kept(work: Workload) -> int:
    """Returns the bytes that a forward pass keeps, without what layers share."""
    return activations(work, (isp if work.layout.mode == "isp" else tensor).memory(work)) - tables(work)


def gathering(work: Workload) -> Workload:
    """Returns the same sizes if isp gathers the weights of experts, with which a rank keeps the least."""
    return replace(work, layout=replace(work.layout, expert_inner=2))
