"""The search of layouts: against trying all of them."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Literal

import pytest

from internevo.config import Config, validate
from internevo.data.batches import BatchSizes
from internevo.models.families.registry import decoder_config
from internevo.parallel.kept import points
from internevo.parallel.layout import Layout
from internevo.parallel.orders import BACKWARD
from internevo.planner import hardware, memory, step
from internevo.planner.bounds import fullest, share
from internevo.planner.calibration import Calibration
from internevo.planner.choice import Choice, axes, divisors, in_rows, schedules, weights
from internevo.planner.costs import NOTHING, Recomputation
from internevo.planner.job import Job
from internevo.planner.search import Candidate, Search
from internevo.train.check import problems
from tests.conftest import tiny

GPU = replace(hardware.find("a100"), gpus_per_node=4)
MODEL = {"num_layers": 2, "hidden_size": 512, "num_attention_heads": 8, "vocab_size": 1024, "dtype": "torch.bfloat16"}
EXPERTS = {"num_experts": 4, "top_k": 2, "moe_intermediate_size": 512, "num_kv_attention_heads": 4}


def config(experts: bool = False, rows: int = 8) -> Config:
    changes = {f"model__{key}": value for key, value in {**MODEL, **(EXPERTS if experts else {})}.items()}
    family = {"model_type": "QWEN3MOE"} if experts else {"model_type": "LLAMA2"}
    return validate(tiny(**family, **changes, data__global_batch_size=rows, data__seq_len=512))


def search(this: Config, world: int, limit: int, imbalance: float = 1.0) -> Search:
    asked, decoder = in_rows(this, world), decoder_config(this.model_type, this.model)
    assert asked is not None and asked.data.global_batch_size is not None
    return Search(asked, decoder, world, asked.data.global_batch_size, GPU, Calibration(), limit, imbalance)


def everything(of: Search) -> Iterator[Choice]:
    """All legal layouts, with all kinds and amounts of recomputation."""
    layers = of.decoder.num_layers
    shares = [share(n, layers) for n in range(1, layers + 1)]
    amounts: list[float | Literal["attention"]] = [*shares, "attention"]
    again: list[tuple[float | Literal["attention"], bool]] = [(0.0, False), *product(amounts, (False, True))]
    for choice in axes(of.config, of.world):
        if of.rows % (of.world // (choice.pipeline * choice.tensor)) or not of.is_legal(choice):
            continue
        sizes = divisors(of.rows // (of.world // (choice.pipeline * choice.tensor)))
        zeros = divisors(of.world // choice.pipeline)
        sharded = list(weights(choice, of.config, of.world))
        plain, fsdp_or_not = [option for option in sharded if not option.fsdp], sorted({option.fsdp for option in sharded})
        for option, size, (schedule, chunks), zero, fsdp in product(
            plain, sizes, schedules(choice.pipeline, layers), zeros, fsdp_or_not
        ):
            option = option._replace(micro_bsz=size, schedule=schedule, chunks=chunks, zero=zero, fsdp=fsdp)
            if of.is_legal(option):
                layout = of.job(option).work.layout
                for expert_zero in zeros if layout.experts_apart else [-1]:
                    option = option._replace(expert_zero=expert_zero)
                    if of.is_legal(option):
                        yield from (option._replace(checkpoint=what, selective=selective) for what, selective in again)


@pytest.mark.parametrize(
    ("experts", "world", "megabytes"),
    [(False, 4, 10**6), (False, 4, 20), (True, 2, 10**6), (True, 4, 52)],
)
def test_the_search_finds_what_trying_all_layouts_finds(experts: bool, world: int, megabytes: int) -> None:
    this = search(config(experts, rows=4 if experts else 8), world, megabytes * 10**6)
    found = this.best(5)
    tried = [candidate for choice in everything(this) if this.fits(choice) for candidate in [this.seconds(choice)]]
    best = sorted(tried)
    assert found and found[0].prediction.step == pytest.approx(best[0])
    assert all(candidate.memory.total <= this.limit for candidate in found)
    steps = [candidate.prediction.step for candidate in found]
    assert steps == sorted(steps)
    if megabytes == 10**6:  # then nothing is recomputed, and the others are the next best layouts
        plain = sorted(this.seconds(c) for c in everything(this) if c.checkpoint == 0.0)
        assert steps == pytest.approx(plain[:5])


@pytest.mark.parametrize(("experts", "world"), [(False, 4), (True, 4), (False, 6)])
def test_no_layout_is_faster_than_its_bounds(experts: bool, world: int) -> None:
    """On one node of four GPUs, and on a node and a half."""
    this = search(config(experts, rows=2 * world), world, 10**12)
    tried, bounds = list(everything(this)), this.bounds
    for choice in tried[:: max(1, len(tried) // 400)]:
        seconds = this.seconds(choice) * (1 + 1e-9)
        open_axes = choice._replace(weight=1, expert_weight=1)
        largest = this.rows // (this.world // (choice.pipeline * choice.tensor))
        assert bounds.of_axes(open_axes._replace(micro_bsz=largest)) <= seconds
        assert bounds.of_axes(open_axes) <= seconds
        plain = open_axes._replace(fsdp=False, checkpoint=0.0)
        assert bounds.of_schedule(plain) <= seconds
        assert bounds.of_weights([choice])[0] <= seconds
        assert bounds.of_memory(choice) <= seconds
        assert step.at_least(this.job(choice._replace(zero=-1, expert_zero=-1)), GPU, Calibration(), {}) <= seconds
        if choice.expert_zero > 0:
            assert step.at_least(this.job(choice._replace(expert_zero=-1)), GPU, Calibration(), {}, choice.zero) <= seconds


@pytest.mark.parametrize("world", [12, 24])
def test_padding_of_the_shards_of_experts_is_in_no_bound(world: int) -> None:
    """Two experts over 12 ranks are padded to 12, and over 2 ranks they are not."""
    this = search(config(True, rows=world), world, 10**12)
    tried = 0
    for expert, fsdp in product((1, 2, 4), (False, True)):
        choice = Choice(expert=expert, zero=1, fsdp=fsdp)
        layout = this.job(choice).work.layout
        bounds = [step.at_least(this.job(choice), GPU, Calibration(), {}, zero) for zero in (None, choice.zero)]
        for expert_zero in divisors(world // expert) if layout.experts_apart else [-1]:
            assert max(bounds) <= this.seconds(choice._replace(expert_zero=expert_zero)) * (1 + 1e-9)
            tried += 1
    assert tried > 10


@pytest.mark.parametrize("experts", [False, True])
def test_no_layout_needs_less_memory_than_its_bound(experts: bool) -> None:
    this = search(config(experts), 4, 10**12)
    tried = list(everything(this))
    for choice in tried[:: max(1, len(tried) // 300)]:
        again, job = Recomputation.of(choice), this.job(choice._replace(zero=-1, expert_zero=-1))
        parts, total = this.bounds.parts(choice, again), memory.on_rank(job, 0).total
        at_most = [
            need
            for part, need in zip(parts, this.bounds.needs(choice, again), strict=True)
            if again.what != "layer" or part >= choice.checkpoint
        ]
        assert at_most[0] <= total
        assert at_most[0] >= 0.5 * total or again != NOTHING  # otherwise it would be of no use


@pytest.mark.parametrize(("schedule", "chunks"), [("1F1B", 1), ("1F1B", 2), ("1F1B", 3), ("ZBH1", 1), ("ZBV", 2)])
def test_the_activations_that_a_rank_certainly_keeps(schedule: str, chunks: int) -> None:
    for ranks, micro_batches in product((2, 3, 4), range(1, 12)):
        kept = points(schedule, ranks, chunks, micro_batches, 0)
        for counts, begun in zip(fullest(schedule, ranks, chunks, micro_batches), (False, True), strict=True):
            assert counts is None or any(
                all(have >= number for have, number in zip(point.forward, counts, strict=True))
                and (not begun or all(BACKWARD in passes for passes in point.passes))
                for point in kept
            )


def test_a_job_is_that_of_the_written_config() -> None:
    this = search(config(True), 4, 10**12)
    tried = list(everything(this))
    for choice in tried[:: max(1, len(tried) // 100)]:
        changed = choice.apply(this.config, this.rows)
        layout = Layout.from_config(changed, 4)
        assert Choice.of(changed, layout) == choice
        job, written = this.job(choice), Job.from_config(this.decoder, changed, layout, this.job(choice).work.micro_batches)
        assert job.stages() == written.stages()
        assert replace(job, layers=()) == replace(written, layers=())


def test_shares_of_layers() -> None:
    for layers in range(1, 100):
        assert [int(layers * share(n, layers)) for n in range(1, layers + 1)] == list(range(1, layers + 1))


def test_the_layout_with_the_least_memory() -> None:
    this = search(config(), 8, 1)
    assert this.best(1) == []
    least = this.least()
    assert isinstance(least, Candidate) and least.choice.checkpoint == 1.0
    assert replace(this, limit=least.memory.total).best(1)


@pytest.mark.parametrize("world", [2, 4, 8])
@pytest.mark.parametrize("rows", [None, 32])
def test_a_layout_that_is_found_has_the_batches_of_the_config_in_every_step(world: int, rows: int | None) -> None:
    """With a ramp-up in micro-batches of the config's own layout, or in rows."""
    this = config(rows=32)
    data = {"global_batch_size": rows, "micro_num": 8, "micro_bsz": 2, "rampup_batch_size": "4 8 3" if rows else "1 2 3"}
    this = this.model_copy(update={"data": this.data.model_copy(update=data)})

    def batches(of: Config, ranks: int) -> list[int]:
        return [BatchSizes.from_config(of.data, ranks).rows(batch) for batch in range(30)]

    wanted = batches(this, world) if rows is None else [min(4 + 8 * (batch // 3), rows) for batch in range(30)]
    found = search(this, world, 10**12)
    best = found.best(10)
    assert best and len({candidate.choice.micro_bsz for candidate in best} | {c.choice.pipeline for c in best}) > 1
    for candidate in best:
        written = candidate.choice.apply(found.config, found.rows)
        assert not problems(written, world)
        assert batches(written, Layout.from_config(written, world).data) == wanted
