"""The time of a step: what each stage computes and communicates, what of that hides, and what the pipeline makes of it.

``counts.py`` says what has to be done, which depends on the layout, and this file how long that takes on a machine.

| communication                           | waited for                                                          |
|-----------------------------------------|---------------------------------------------------------------------|
| tensor (mtp, msp, fsp; isp's all-to-all)| yes                                                                 |
| expert all-to-all                       | yes                                                                 |
| weight, expert weight (isp)             | with prefetching, only what is longer than what the pass computes   |
| zero, replicate with FSDP               | the same, in each pass                                              |
| zero, replicate with ZeRO-1.5           | the same, in the first forward and the last backward pass of a step |
| pipeline                                | as the schedule, played out, says                                   |

What hides takes its share of the GPU's multiprocessors and of its memory bandwidth: of the time in which both run,
``Calibration.overlap`` is gained.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

from ..parallel.orders import rank_of
from . import kernels, links, timing
from .calibration import Calibration
from .counts import Counts, Insides, Message, StageCounts, count
from .flops import Amounts
from .hardware import GIGA, GPU
from .job import Job
from .links import Group

OPTIMIZER_BYTES = 30
"""For each element of a shard: AdamW reads the master weight, two moments and the gradient in fp32, and writes the first three
and a weight in bf16."""


@dataclass(frozen=True)
class Times:
    """The seconds of a step: those of the pipeline rank that computes the longest. They add up to the step."""

    compute: float
    communication: float
    """Exposed: what is waited for."""
    bubble: float
    optimizer: float
    other: float
    step: float


@dataclass(frozen=True)
class Prediction(Times):
    """A step on paper."""

    tgs: float
    """Tokens per GPU and second."""
    tflops: float
    """Model FLOPs per GPU and second, in 10^12 (``DecoderConfig.flops_per_token``: recomputation is not counted, and of
    attention what the causal mask leaves)."""
    mfu: float
    """Those, as a share of the GPU's peak in bf16, whatever the precision."""


@dataclass(frozen=True)
class Budget:
    """What a number of tokens costs."""

    hours: float
    gpu_hours: float
    megawatt_hours: float
    """Of the GPUs alone."""
    dollars: float


def budget(tokens: float, prediction: Prediction, gpus: int, gpu: GPU) -> Budget:
    """Returns what it costs to train on ``tokens`` tokens."""
    hours = tokens / (prediction.tgs * gpus) / 3600
    return Budget(hours, hours * gpus, hours * gpus * gpu.watts / 1e6, hours * gpus * gpu.dollars_per_hour)


def predict(job: Job, gpu: GPU, calibration: Calibration) -> Prediction:
    """Returns the time of a step, and what it is made of."""
    return price(count(job), gpu, calibration)


# How long it takes ---------------------------------------------------------------------------------------------------


class StageSeconds(NamedTuple):
    """Times of a stage."""

    forward: float
    backward: float
    weights: float
    """Of the gradients of weights, if the schedule computes them apart; otherwise 0."""
    exposed: float
    """What of these is communication."""
    data: float
    """Exposed communication of the data axis, once per step."""
    optimizer: float


def price(counts: Counts, gpu: GPU, calibration: Calibration) -> Prediction:
    """Returns the time of a step on a machine."""
    job, times = counts.job, timed(counts, gpu, calibration)
    tgs = job.global_tokens / job.work.layout.world / times.step
    achieved = tgs * job.work.decoder.flops_per_token(job.seq_len)
    return Prediction(**asdict(times), tgs=tgs, tflops=achieved / 1e12, mfu=achieved / gpu.peak("bf16"))


def timed(counts: Counts, gpu: GPU, calibration: Calibration) -> Times:
    """Returns the seconds of a step on a machine."""
    job, layout, work = counts.job, counts.job.work.layout, counts.job.work
    gpu = gpu.in_world(layout.world)
    known = {id(stage): _price_stage(job, stage, gpu, calibration) for stage in counts.stages}
    stages = [known[id(stage)] for stage in counts.stages]
    times = [value for stage in stages for value in (stage.forward, stage.backward, stage.weights)]
    hops = hops_of(counts.message, gpu, calibration)
    passes = timing.seconds(work.schedule, layout.pipeline, layout.chunks, work.micro_batches, times, hops)
    on_rank: list[list[StageSeconds]] = [[] for _ in range(layout.pipeline)]
    for number, stage in enumerate(stages):
        on_rank[rank_of(number, layout.pipeline, work.schedule)].append(stage)
    slowest = max(on_rank, key=lambda rank: sum(s.forward + s.backward + s.weights for s in rank))
    data, optimizer = max(((sum(s.data for s in rank), sum(s.optimizer for s in rank)) for rank in on_rank), key=sum)
    busy = work.micro_batches * sum(s.forward + s.backward + s.weights for s in slowest)
    exposed = work.micro_batches * sum(s.exposed for s in slowest)
    step = passes + data + optimizer + calibration.step
    return Times(busy - exposed, exposed + data, passes - busy, optimizer, calibration.step, step)


def hops_of(message: Message | None, gpu: GPU, calibration: Calibration) -> timing.Hops:
    """Returns the times of the messages of a pipeline, some of which go to other nodes."""
    if message is None:
        return timing.Hops()
    stride, node = message.group.stride, gpu.gpus_per_node
    inside, across = (seconds_of([message._replace(group=Group(2, far))], gpu, calibration) for far in (1, node))
    return timing.Hops(inside, across, 1 if node % stride else node // stride)


def _price_stage(job: Job, counts: StageCounts, gpu: GPU, calibration: Calibration) -> StageSeconds:
    def time(amounts: Amounts) -> float:
        return kernels.seconds(amounts, gpu, calibration, job.precision)

    passes, apart = counts.passes, job.work.zero_bubble
    forward, again, weights = time(passes.forward), time(passes.again), time(passes.weights)
    backward = time(passes.inputs) + again + (0.0 if apart else weights)
    repeats = again / forward if forward else 0.0
    waited = seconds_of(counts.waited, gpu, calibration)
    waited_forward = waited / (2 + repeats)  # what the backward pass has is the same twice: its own, and what it repeats

    def both(found: Iterable[Message]) -> tuple[float, float]:
        """Returns the seconds of collectives, and those during which nothing computes."""
        total = alone = 0.0
        for message in found:
            seconds = links.seconds(*message[:4], gpu, calibration)
            total, alone = total + seconds, alone + seconds * _alone(message, counts)
        return total, alone

    gathered, first = both([m for m in counts.prefetched if m.kind == "all-gather"])
    reduced, last = both([m for m in counts.prefetched if m.kind != "all-gather"])
    exposed_forward = waited_forward + exposed(gathered / 2, forward, calibration, first / 2)
    exposed_backward = waited - waited_forward + exposed(gathered / 2 + reduced, backward, calibration, first / 2 + last)
    once_gathered, once_first = both(counts.gathered)
    once_reduced, once_last = both(counts.reduced)
    once = exposed(once_gathered, forward * job.overlaps_weights, calibration, once_first)
    once += exposed(once_reduced, backward * job.overlaps_gradients, calibration, once_last)
    optimizer = counts.shard * OPTIMIZER_BYTES / (gpu.memory_gb_per_s * GIGA * calibration.memory)
    optimizer += kernels.seconds(counts.update, gpu, calibration) + seconds_of(counts.exchanged, gpu, calibration)
    return StageSeconds(
        forward + exposed_forward, backward + exposed_backward, weights if apart else 0.0,
        exposed_forward + exposed_backward, once, optimizer,
    )  # fmt: skip


def _alone(message: Message, counts: StageCounts) -> float:
    """Returns the share of prefetched collectives during which nothing computes: of the data axis the first unit, which is not
    one of experts; of isp's weights and those of experts the first gather of a pass, or its last reduction."""
    if message.axis in ("weight", "expert weight"):
        return min(1.0, (2 if message.kind == "all-gather" else 1) / message.number)
    return counts.first if message.axis in ("zero", "replicate") else 0.0


def exposed(communication: float, computation: float, calibration: Calibration, alone: float = 0.0) -> float:
    """Returns how much longer a pass gets by communication of which all but ``alone`` seconds run at the same time."""
    return communication - calibration.overlap * min(communication - alone, computation)


def seconds_of(found: Iterable[Message], gpu: GPU, calibration: Calibration) -> float:
    """Returns how long collectives take, one after the other."""
    return sum(links.seconds(*message[:4], gpu, calibration) for message in found)


# Lower bounds --------------------------------------------------------------------------------------------------------

NO_LATENCY = 1e-9
"""A number of collectives that have no latency."""


def at_least(job: Job, gpu: GPU, calibration: Calibration, insides: Insides, zero: int | None = None) -> float:
    """Returns a time that no step is shorter than, whatever the ranks over which the optimizer state is sharded: gradients are
    reduced over all of them, without latencies, and nothing is gathered. (Of two reductions, one over some of the ranks and one
    over the others, each byte that leaves a rank takes at least as long.)

    Args:
        insides: as for ``count``.
        zero: the ranks for dense weights, if only those for experts may be any.
    """
    layout, experts = job.work.layout, job.work.layout.experts.axes
    most, most_of_experts = layout.zero * layout.replicate, experts["zero"] * experts["replicate"]
    counts = count(job, insides, (most if zero is None else zero, most_of_experts))
    axes = ("expert zero",) if zero is not None else ("zero", "expert zero")
    stages = tuple(_without_shards(stage, axes, job.work.gradient_bytes) for stage in counts.stages)
    return timed(replace(counts, stages=stages), gpu, calibration).step


def _without_shards(stage: StageCounts, axes: Sequence[str], gradient_bytes: int) -> StageCounts:
    """Returns a stage without the collectives over these axes, but for the bytes of its gradients, without padding; and without
    shards."""

    def changed(found: Sequence[Message]) -> list[Message]:
        kept = [m for m in found if m.kind != "all-gather" or m.axis not in axes]
        return [
            m._replace(number=NO_LATENCY, nbytes=stage.elements[m.axis] * gradient_bytes) if m.axis in axes else m for m in kept
        ]

    return stage._replace(
        prefetched=changed(stage.prefetched), gathered=changed(stage.gathered), reduced=changed(stage.reduced), shard=0.0
    )
