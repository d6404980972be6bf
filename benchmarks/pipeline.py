"""Pipelines: the idle time of each schedule, and the speed of 1F1B against PyTorch's own.

``python benchmarks/pipeline.py`` measures the schedules where processes do not compete for cores: stages whose passes are waits
of a known length, in the program's own ``Pipeline``, with its messages, over gloo. Each round takes a step of each schedule;
printed are medians of the rounds. The ranks have the same number of layers in every schedule: a forward pass, the gradients of
the inputs and those of the weights of all layers of a rank take ``--seconds`` each. Activations are the most that a rank
keeps, in those of one micro-batch through all of its layers. ``--out FOLDER`` draws a timeline of each.

``python benchmarks/pipeline.py --speed`` trains the same model with 1F1B and with
``torch.distributed.pipelining.Schedule1F1B`` with static shapes, gradient clipping and fused AdamW, in fp32. Both are in the
same processes with one thread each, and take turns step by step, so that both see the same machine.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from ours import SHAPES, config_of, steps_of, tokens_and_labels
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from turns import run_processes

from internevo.data.batches import MicroBatch
from internevo.measure.timeline import record_passes
from internevo.models.config import Stage
from internevo.models.decoder import Decoder
from internevo.models.families.registry import decoder_config
from internevo.models.losses import HandedOn, Loss, LossTerms, Routed
from internevo.observe.timeline import draw, name_of
from internevo.parallel.data_axis import SingleProcess
from internevo.parallel.deferred import Deferred
from internevo.parallel.messages import Channels
from internevo.parallel.orders import Timed, bubble, orders, play, rank_of
from internevo.parallel.pipeline import Chunk, Chunks, Pipeline
from internevo.parallel.stages import split
from internevo.parallel.views import Groups
from internevo.parallel.world import World, join
from internevo.train.process import keep_freed_memory

RANKS, MICRO_BATCHES = 4, 8
SCHEDULES = [("1F1B", 1), ("1F1B", 2), ("ZBH1", 1), ("ZBV", 2)]

# Stages that wait ----------------------------------------------------------------------------------------------------


class Kept:
    """Counts the activations that a rank keeps: each is there from its forward pass until nothing refers to it."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def add(self) -> KeptActivation:
        self.now += 1
        self.most = max(self.most, self.now)
        return KeptActivation(self)


class KeptActivation:
    """One of them."""

    def __init__(self, count: Kept) -> None:
        self.count = count

    def __del__(self) -> None:
        self.count.now -= 1


class Wait(torch.autograd.Function):
    """Passes that only wait."""

    @staticmethod
    def forward(ctx, weight: Tensor, hidden: Tensor, stage: WaitingStage):  # type: ignore[no-untyped-def]
        ctx.stage, ctx.kept = stage, stage.kept.add()
        time.sleep(stage.seconds)
        return hidden.clone()

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        stage, kept = ctx.stage, ctx.kept
        time.sleep(stage.seconds)

        def products(kept: KeptActivation = kept) -> list[Tensor]:
            time.sleep(stage.seconds)
            return [torch.zeros_like(stage.weight)]

        if stage.deferred is None:
            return *products(), grad, None
        stage.deferred.leave([stage.weight], products)
        return None, grad, None


class WaitingStage(nn.Module):
    """Stands for a ``Decoder`` of one stage."""

    def __init__(self, stage: Stage, seconds: float, deferred: Deferred | None, kept: Kept) -> None:
        super().__init__()
        self.stage, self.seconds, self.deferred, self.kept = stage, seconds, deferred, kept
        self.config = decoder_config("LLAMA2", config_of(SHAPES["tiny"], "float32").model)
        self.weight = nn.Parameter(torch.zeros(1))

    def materialize(self, device: torch.device) -> None:
        """Nothing has to be allocated."""

    def forward(
        self, tokens: Tensor, cu_seqlens: Any, labels: Tensor, terms: LossTerms, hidden: Tensor | None = None
    ) -> HandedOn | Loss:
        if hidden is None:
            hidden = torch.zeros(*tokens.shape, self.config.hidden_size, requires_grad=True)
        hidden = cast(Tensor, Wait.apply(self.weight, hidden, self))
        routed = Routed({}, None)
        return Loss(hidden.sum(), torch.zeros(tokens.shape), routed) if self.stage.heads else HandedOn(hidden, None, routed)


class Waiting:
    """A pipeline of such stages: this rank's part of it."""

    def __init__(self, groups: Groups, mode: str, chunks: int, seconds: float) -> None:
        count, device = dist.get_world_size() * chunks, torch.device("cpu")
        ranks = [rank_of(stage, dist.get_world_size(), mode) for stage in range(count)]
        self.mode, self.kept, self.per_rank = mode, Kept(), chunks
        self.channels = Channels(groups, [range(dist.get_world_size())], ranks, device, torch.float32)
        mine = []
        for number in (n for n in range(count) if ranks[n] == dist.get_rank()):
            deferred = None if mode == "1F1B" else Deferred()
            stage = Stage(range(number, number + 1), embeds=number == 0, heads=number == count - 1)
            model = cast(Decoder, WaitingStage(stage, seconds / chunks, deferred, self.kept))
            mine.append(Chunk(number, model, SingleProcess(model, device, torch.float32), deferred))
        axis = Chunks([chunk.axis for chunk in mine], None)
        self.pipeline = Pipeline(mode, mine, axis, self.channels, 1)

    def step(self, micro_batches: int) -> tuple[dict[str, Any], float]:
        """Returns the timeline (on rank 0), and the activations that the rank with the most has kept."""
        tokens = torch.zeros(1, 8, dtype=torch.int64)
        self.kept.most = 0
        dist.barrier()
        with record_passes(self.channels, self.mode) as found:
            batch = [MicroBatch(tokens, tokens, tokens, None)] * micro_batches
            self.pipeline.train(batch, LossTerms(), 1.0, lambda batch, result: None)
        most = torch.tensor(self.kept.most)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return found, int(most) / self.per_rank


def waiting(seconds: float, rounds: int, out: Path | None) -> Iterator[str]:
    """Yields the lines of the table, on rank 0."""
    groups = Groups()
    pipelines = [Waiting(groups, mode, chunks, seconds) for mode, chunks in SCHEDULES]
    steps = [[pipeline.step(MICRO_BATCHES) for pipeline in pipelines] for _ in range(rounds)]
    if dist.get_rank() != 0:
        return
    yield f"{'schedule':17}{'step':>9}{'played':>9}{'idle':>8}{'played':>8}{'ratio':>7}{'speed':>7}{'activations':>13}"
    of_1f1b = 0.0
    for (mode, chunks), results in zip(SCHEDULES, zip(*steps, strict=True), strict=True):
        found = sorted((timeline for timeline, _ in results), key=length_of)
        length, idle = length_of(found[rounds // 2]), statistics.median(timeline["idle"] for timeline in found)
        played = simulate(mode, chunks, seconds)
        end, expected = max(timed.end for timed in itertools.chain(*played)), bubble(played)
        of_1f1b = of_1f1b or length
        name = name_of(mode, chunks)
        yield (
            f"{name:17}{length * 1e3:6.0f} ms{end * 1e3:6.0f} ms{idle:8.2%}{expected:8.2%}{idle / expected:7.3f}"
            f"{of_1f1b / length:7.3f}{max(kept for _, kept in results):13.1f}"
        )
        if out is not None:
            (out / f"timeline-{name.replace(' ', '-')}.svg").write_text(draw(found[rounds // 2]), encoding="utf-8")


def simulate(mode: str, chunks: int, seconds: float) -> list[list[Timed]]:
    """Plays a schedule out with passes of this length."""
    passes = {"F": 1, "B": 2 if mode == "1F1B" else 1, "W": 1}
    all_orders = orders(mode, RANKS, chunks, MICRO_BATCHES)
    return play(all_orders, lambda action: passes[action.kind] * seconds / chunks)


def length_of(timeline: dict[str, Any]) -> float:
    """Seconds from the first to the last pass."""
    return max(end for spans in timeline["ranks"] for kind, *_, end in spans if kind in "FBW")


# Speed ---------------------------------------------------------------------------------------------------------------


def theirs(shape: dict[str, int], steps: int, group: dist.ProcessGroup) -> Iterator[float]:
    """Seconds per step of PyTorch's pipeline, whose stages look up the tokens of a micro-batch by its number."""
    rank, ranks, count = dist.get_rank(), dist.get_world_size(), MICRO_BATCHES
    decoder = decoder_config("LLAMA2", config_of(shape, "float32").model)
    model = Decoder(decoder, split(decoder, ranks, shape["seq"])[rank])
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.02)
    batches = [tokens_and_labels(shape) for _ in range(count)]

    class Looking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, hidden: Tensor | None = None, *, number: Tensor) -> Tensor:
            tokens, labels = batches[int(number)]
            result = self.model(tokens, labels=labels, hidden=hidden)
            return result.hidden if isinstance(result, HandedOn) else result.total / (labels.numel() * count)

    hidden = torch.empty(shape["rows"], shape["seq"], shape["hidden"], requires_grad=True)
    stage = PipelineStage(
        Looking(), rank, ranks, torch.device("cpu"), input_args=() if rank == 0 else hidden, group=group,
        output_args=torch.empty((), requires_grad=True) if rank == ranks - 1 else hidden,
    )  # fmt: skip
    schedule = Schedule1F1B(stage, count, loss_fn=lambda output, _: output, scale_grads=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    for _ in range(steps):
        batches[:] = [tokens_and_labels(shape) for _ in range(count)]
        numbers = torch.arange(count)
        begin = time.perf_counter()
        schedule.step(number=numbers, target=numbers, return_outputs=False)
        square = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).square()
        dist.all_reduce(square, group=group)
        nn.utils.clip_grads_with_norm_(model.parameters(), 1.0, square.sqrt())
        optimizer.step()
        optimizer.zero_grad()
        yield time.perf_counter() - begin


def speed(world: World, shape: dict[str, int], rounds: int, steps: int) -> Iterator[str]:
    """Yields the lines of the table, on rank 0. The first two steps are left out."""
    keep_freed_memory()
    total, times = 2 + rounds * steps, list[list[float]]()
    sides = [
        steps_of(world, shape, "float32", parallel={"pipeline": {"size": world.size}}, micro_batches=MICRO_BATCHES),
        theirs(shape, total, dist.new_group(backend="gloo")),
    ]
    for number in range(total):
        pair = [0.0, 0.0]
        for side in (0, 1) if number % 2 else (1, 0):
            dist.barrier()
            pair[side] = next(sides[side])
            begin = time.perf_counter()
            dist.barrier()  # the step has ended on all ranks
            pair[side] += time.perf_counter() - begin
        times.append(pair)
    if world.rank == 0:
        yield f"{'round':7}{'ours':>10}{'Schedule1F1B':>14}{'speed ratio':>13}"
        medians = []
        for number in range(rounds):
            of_round = times[2 + number * steps :][:steps]
            mine, peer = (statistics.median(side) for side in zip(*of_round, strict=True))
            medians.append((mine, peer, peer / mine))
            yield f"{number + 1:<7}{mine:8.3f} s{peer:12.3f} s{peer / mine:13.2f}"
        mine, peer, ratio = (statistics.median(column) for column in zip(*medians, strict=True))
        yield f"{'median':7}{mine:8.3f} s{peer:12.3f} s{ratio:13.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--speed", action="store_true", help="compare the speed with PyTorch's schedule")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.04, help="length of a wait")
    parser.add_argument("--out", type=Path, help="folder for pictures of the timelines")
    parser.add_argument("--shape", default="S12", choices=list(SHAPES), help="with --speed")
    parser.add_argument("--steps", type=int, default=3, help="steps per round, with --speed")
    a = parser.parse_args()
    if "RANK" not in os.environ:
        print(run_processes([sys.executable, __file__, *sys.argv[1:]], RANKS), end="")
        return
    with join() as world:
        lines = speed(world, SHAPES[a.shape], a.rounds, a.steps) if a.speed else waiting(a.seconds, a.rounds, a.out)
        for line in lines:
            print(line, flush=True)


if __name__ == "__main__":
    main()
