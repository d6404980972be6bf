"""What ``internevo plan`` prints: a table of layouts, one layout in full, and why one is faster than another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

from ..observe.units import decimals
from ..parallel import plan
from ..parallel.memory import Memory
from ..parallel.strategy import Collectives, add_up
from ..train.step import traffic as traffic_of_update
from ..wording import counted
from . import step
from .calibration import Calibration
from .choice import Choice
from .hardware import GPU
from .links import Group
from .search import Candidate

GIB = 2**30
PARTS = {
    "compute": "computation", "communication": "exposed communication", "bubble": "bubble of the pipeline",
    "optimizer": "optimizer", "other": "data, logging, waiting",
}  # fmt: skip
"""The parts of a step's time, by their names in ``Prediction``."""
IMBALANCE = "experts' imbalance"
"""What it takes longer because some experts get more rows than others."""


def describe(choice: Choice) -> str:
    """Returns a layout in short words."""
    words = []
    if choice.pipeline > 1:
        chunks = f" x {choice.chunks} chunks" if choice.chunks > 1 else ""
        words.append(f"pipeline {choice.pipeline} {choice.schedule}{chunks}")
    if choice.mode == "isp":
        two = f" ({choice.tensor // choice.context} heads x {choice.context} context)" if choice.context > 1 else ""
        words.append(f"isp {choice.tensor}{two} weight {choice.weight}")
    elif choice.tensor > 1:
        words.append(f"{choice.mode} {choice.tensor}{' (experts whole)' if choice.no_tp else ''}")
    if choice.expert > 1:
        words.append(f"expert {choice.expert}")
    if choice.expert_weight > 1:
        words.append(f"expert weight {choice.expert_weight}")
    words.append(f"{'FSDP' if choice.fsdp else 'ZeRO'} {choice.zero if choice.zero > 0 else 'over all ranks'}")
    if choice.expert_zero > 0:
        words.append(f"expert ZeRO {choice.expert_zero}")
    words.append(f"micro-batch {choice.micro_bsz}")
    if choice.checkpoint:
        what = choice.checkpoint if isinstance(choice.checkpoint, str) else f"{choice.checkpoint:.0%} of the layers"
        words.append(f"recompute {what}{' except the kernels of attention' if choice.selective else ''}")
    return ", ".join(words)


def table(candidates: Sequence[Candidate], first: str = "") -> list[str]:
    """Returns a table of layouts, one a line.

    Args:
        first: what stands in place of the number.
    """
    lines = [] if first else [f"{'':>4}{'TGS':>9}{'MFU':>8}{'step s':>9}{'GiB':>8}  layout"]
    for number, candidate in enumerate(candidates, start=1):
        p = candidate.prediction
        memory, name = candidate.memory.total / GIB, first or str(number)
        step_, size = f"{p.step:.{decimals(p.step, 3, 3)}f}", f"{memory:.{decimals(memory, 3, 1)}f}"
        lines.append(f"{name:>4}{p.tgs:>9,.0f}{p.mfu:>8.1%}{step_:>9}{size:>8}  {describe(candidate.choice)}")
    return lines


def in_full(candidate: Candidate, gpu: GPU, calibration: Calibration, limit: int, tokens: float | None) -> Iterator[str]:
    """Yields the memory, the time, the communication and the cost of a layout."""
    job, p, memory = candidate.job, candidate.prediction, candidate.memory
    layout = job.work.layout
    ranks, number = layout.data, job.work.micro_batches
    yield f"{describe(candidate.choice)}: {counted(ranks, 'data rank')}, {counted(number, 'micro-batch')} on each"
    yield f"  {p.tgs:,.0f} tokens per GPU and second, {p.tflops:.0f} TFLOPS, MFU {p.mfu:.1%}"
    if layout.pipeline > 1:
        yield f"  layers of the stages: {' '.join(map(str, _layers(candidate)))}"
    where = f"on pipeline rank {memory.pipeline_rank}, the most loaded"
    places = decimals(memory.total / GIB, 3, 2)
    yield f"  memory, GiB{memory.total / GIB:>18.{places}f}  of {limit / GIB:.1f}, {where}"
    for part, nbytes in memory_parts(candidate).items():
        yield f"    {part:24}{nbytes / GIB:>10.{places}f}"
    places = decimals(p.step, 3, 3)
    yield f"  step, s{p.step:>22.{places}f}"
    for part, seconds in time_parts(candidate, gpu, calibration).items():
        yield f"    {part:24}{seconds:>10.{places}f}{seconds / p.step:>8.1%}"
    of = f"pipeline rank {memory.pipeline_rank}" if layout.pipeline > 1 else "a rank"
    yield f"  {f'communication of {of}, a step':38}{'group':>16}{'ranks':>7}{'over':>9}{'count':>8}{'GB sent':>10}"
    for row in traffic(candidate, gpu):
        over = f"{row['group']:>16}{row['ranks']:>7}{row['over']:>9}"
        yield f"    {row['kind']:36}{over}{row['count']:>8,}{row['sent'] / 1e9:>10.3f}"
    if tokens:
        cost = step.budget(tokens, p, layout.world, gpu)
        yield (
            f"  {tokens:,.0f} tokens: {_rounded(cost.hours / 24, 1)} days, {_rounded(cost.gpu_hours, 0)} GPU hours, "
            f"{_rounded(cost.megawatt_hours, 1)} MWh (GPUs alone, {gpu.watts:g} W each), "
            f"{_rounded(cost.dollars, 0)} dollars ({gpu.dollars_per_hour:g} for an hour of a GPU)"
        )


def _rounded(number: float, least: int) -> str:
    """Returns a number with at least this many decimals, and as many as two digits take."""
    return f"{number:,.{decimals(number, 2, least)}f}"


def memory_parts(candidate: Candidate) -> dict[str, int]:
    """Returns the bytes of the most loaded rank, by part."""
    kept = candidate.memory.kept
    parts = {name: getattr(kept, part) for part, name in Memory.NAMES.items()}
    return {**parts, "temporary buffers": candidate.memory.temporary}


def time_parts(candidate: Candidate, gpu: GPU, calibration: Calibration) -> dict[str, float]:
    """Returns the seconds of a step, by part."""
    parts = {name: getattr(candidate.prediction, part) for part, name in PARTS.items()}
    if candidate.job.imbalance > 1:
        even = step.predict(replace(candidate.job, imbalance=1.0), gpu, calibration)
        more = candidate.prediction.compute - even.compute
        parts[PARTS["compute"]] -= more
        parts[IMBALANCE] = more
    return parts


def traffic(candidate: Candidate, gpu: GPU) -> list[dict[str, Any]]:
    """Returns the collectives and messages of the most loaded rank, as its strategies state them, with the links they use."""
    job = candidate.job
    layout = job.work.layout
    groups, found = layout.groups_of(0), []
    stated = plan.traffic(job.on_rank(candidate.memory.pipeline_rank))
    for row in add_up([*stated, traffic_of_update(job.work.decoder, job.types, layout)], layout):
        ranks = groups.get(row.axis) or list(range(layout.world))
        found.append({
            "kind": row.kind, "group": row.axis, "ranks": len(ranks), "over": _link(row, ranks, gpu), "count": row.count,
            "sent": row.wire(len(ranks)),
        })  # fmt: skip
    return found


def _link(row: Collectives, ranks: Sequence[int], gpu: GPU) -> str:
    """Returns what connects the ranks of each group; "both", if some neighbours of a pipeline are in one node."""
    stride = ranks[1] - ranks[0]
    if Group(len(ranks), stride).in_node(gpu.gpus_per_node) == len(ranks):
        return "node"
    return "both" if row.kind == "send" and stride < gpu.gpus_per_node else "network"


def why(first: Candidate, second: Candidate, gpu: GPU, calibration: Calibration) -> Iterator[str]:
    """Yields why the first of two layouts is faster than the second: the parts of a step that differ, the largest first."""
    a, b = first.prediction, second.prediction
    if a.step == b.step:
        yield "  both take the same time"
        return
    # Differences have two digits, and what they are between as many decimals.
    places, share = decimals(b.step - a.step, 2, 3), 100 * (1 - a.step / b.step)
    times = f"{a.step:.{places}f} in place of {b.step:.{places}f} s, {share:.{decimals(share, 1, 1)}f}%"
    yield f"  its step takes {b.step - a.step:.{places}f} s less ({times})"
    changes = [
        f"{name} {mine} in place of {other}"
        for name, mine, other in zip(Choice._fields, first.choice, second.choice, strict=True)
        if mine != other
    ]
    yield f"  the layouts differ in: {', '.join(changes) or 'nothing'}"
    now, before = ({IMBALANCE: 0.0, **time_parts(candidate, gpu, calibration)} for candidate in (first, second))
    for name in sorted(now, key=lambda name: -abs(before[name] - now[name])):
        gain = before[name] - now[name]
        if abs(gain) > 0.02 * (b.step - a.step):
            how = "less" if gain > 0 else "more"
            yield f"  {name}: {abs(gain):.{places}f} s {how} ({now[name]:.{places}f} in place of {before[name]:.{places}f} s)"
    more = (first.memory.total - second.memory.total) / GIB
    size = f"{_rounded(abs(more), 1)} GiB {'more' if more > 0 else 'less'}" if more else "the same"
    yield f"  memory: {size} on the most loaded rank"


def to_dict(candidate: Candidate, gpu: GPU, calibration: Calibration, tokens: float | None) -> dict[str, Any]:
    """Returns all of that as JSON values. Memory and communication are those of ``pipeline_rank``, which has the most in
    memory."""
    found: dict[str, Any] = {
        "words": describe(candidate.choice), "layout": candidate.choice._asdict(),
        "data_ranks": candidate.job.work.layout.data, "micro_batches": candidate.job.work.micro_batches,
        "layers_of_stages": _layers(candidate), "prediction": asdict(candidate.prediction),
        "pipeline_rank": candidate.memory.pipeline_rank, "memory": {**memory_parts(candidate), "total": candidate.memory.total},
        "seconds": time_parts(candidate, gpu, calibration), "traffic": traffic(candidate, gpu),
    }  # fmt: skip
    if tokens:
        found["budget"] = asdict(step.budget(tokens, candidate.prediction, candidate.job.work.layout.world, gpu))
    return found


def _layers(candidate: Candidate) -> list[int]:
    """Returns the number of layers of each stage."""
    return [len(stage.layers) for stage in candidate.job.stages()]
