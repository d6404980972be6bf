"""The search of layouts: against trying all of them."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Literal

import pytest

from internevo.config import Config, validate
from internevo.models.families.registry import decoder_config
from internevo.parallel.layout import Layout
from internevo.planner import hardware, step
from internevo.planner.calibration import Calibration
from internevo.planner.choice import Choice, divisors, global_rows, shapes
from internevo.planner.job import Job
from internevo.planner.search import Candidate, Search, share
from tests.conftest import tiny

GPU = replace(hardware.find("a100"), gpus_per_node=4)
MODEL = {"num_layers": 2, "hidden_size": 512, "num_attention_heads": 8, "vocab_size": 1024, "dtype": "torch.bfloat16"}
EXPERTS = {"num_experts": 4, "top_k": 2, "moe_intermediate_size": 512, "num_kv_attention_heads": 4}


def config(experts: bool = False, rows: int = 8) -> Config:
    changes = {f"model__{key}": value for key, value in {**MODEL, **(EXPERTS if experts else {})}.items()}
    family = {"model_type": "QWEN3MOE"} if experts else {"model_type": "LLAMA2"}
    return validate(tiny(**family, **changes, data__global_batch_size=rows, data__seq_len=512))


def search(this: Config, world: int, limit: int, imbalance: float = 1.0) -> Search:
    rows, decoder = global_rows(this, world), decoder_config(this.model_type, this.model)
    assert rows is not None
    return Search(this, decoder, world, rows, GPU, Calibration(), limit, imbalance)


def everything(of: Search) -> Iterator[Choice]:
    """All legal layouts, with all kinds and amounts of recomputation."""
    layers = of.decoder.num_layers
    shares = [share(n, layers) for n in range(1, layers + 1)]
    amounts: list[float | Literal["attention"]] = [*shares, "attention"]
    again: list[tuple[float | Literal["attention"], bool]] = [(0.0, False), *product(amounts, (False, True))]
    for shape in shapes(of.config, of.world, of.rows):
        experts = divisors(of.world) if shape.mode == "isp" and of.decoder.experts else [1]
        for zero, fsdp, expert_weight in product(divisors(of.world // shape.pipeline), (False, True), experts):
            choice = replace(shape, zero=zero, fsdp=fsdp, expert_weight=expert_weight)
            if of.is_legal(choice):
                yield from (replace(choice, checkpoint=checkpoint, selective=selective) for checkpoint, selective in again)


@pytest.mark.parametrize(
    ("experts", "world", "megabytes"),
    [(False, 4, 10**6), (False, 4, 20), (True, 4, 10**6), (True, 4, 52)],
)
def test_the_search_finds_what_trying_all_layouts_finds(experts: bool, world: int, megabytes: int) -> None:
    this = search(config(experts), world, megabytes * 10**6)
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


@pytest.mark.parametrize("experts", [False, True])
def test_no_layout_is_faster_than_its_bounds(experts: bool) -> None:
    this = search(config(experts), 4, 10**12)
    tried = list(everything(this))
    for choice in tried[:: max(1, len(tried) // 400)]:
        seconds = this.seconds(choice)
        assert this.bound(replace(choice, zero=-1)) <= seconds * (1 + 1e-9)
        assert step.at_least(this.job(replace(choice, zero=-1)), GPU, Calibration()) <= seconds * (1 + 1e-9)


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
