"""The memory of the most loaded rank."""

from dataclasses import replace

import pytest

from internevo.models.config import DecoderConfig, Experts
from internevo.parallel import plan
from internevo.parallel.layout import Layout
from internevo.parallel.strategy import Workload
from internevo.planner import memory
from internevo.planner.job import Job

TINY = DecoderConfig("llama", 1024, 64, 96, 6, 4, 2, 16)


def job(layout: Layout, recomputed: float = 0.0, decoder: DecoderConfig = TINY) -> Job:
    return Job(Workload(decoder, layout, 256, 4, 2, 4, recomputed, False, None, "cuda"), 128)


def test_the_most_loaded_rank_is_found() -> None:
    this = job(Layout(4, 1, "mtp", 1, 4, 1, False))
    ranks = [memory.on_rank(this, rank) for rank in range(4)]
    found = memory.most_loaded(this)
    assert found in ranks and found.total == max(rank.total for rank in ranks) == found.kept.total + found.temporary
    stages = this.stages()
    for rank in ranks:
        work = replace(this.work, stages=(stages[rank.pipeline_rank],), pipeline_rank=rank.pipeline_rank)
        kept = plan.memory(work)
        assert rank.kept == replace(kept, activations=kept.activations + 16)  # the sums of the losses


@pytest.mark.parametrize("experts", [None, Experts(8, 2, 48)], ids=["dense", "experts"])
@pytest.mark.parametrize("mode", ["mtp", "fsp", "isp"])
def test_fsdp_has_full_weights_for_a_while_and_recomputation_a_layer(mode: str, experts: Experts | None) -> None:
    decoder = replace(TINY, experts=experts, vocab_size=16)
    layout = Layout(8, 2, mode, 2 if mode == "isp" else 1, 1, 4, False)
    plain = memory.most_loaded(job(layout, decoder=decoder))
    fsdp = memory.most_loaded(job(replace(layout, fsdp=True), decoder=decoder))
    again = memory.most_loaded(job(layout, 1.0, decoder))
    assert fsdp.temporary > plain.temporary < again.temporary
    assert again.total < plain.total and fsdp.kept.state < plain.kept.state


@pytest.mark.parametrize(("schedule", "rank", "passes"), [("1F1B", 0, 4), ("1F1B", 3, 1), ("ZBH1", 1, 3)])
def test_kept_scores_by_hand(schedule: str, rank: int, passes: int) -> None:
    """For each layer and micro-batch under way 5 bytes for each pair of tokens and head, and two masks of dropout."""
    decoder = replace(TINY, num_layers=8)
    this = replace(job(Layout(4, 1, "mtp", 1, 4, 1, False, 1, 1, schedule), decoder=decoder), layers=(2, 2, 2, 2))
    layer = 5 * 256 * 128 * 4 + 2 * 64 * 256
    without, kept = (memory.on_rank(j, rank) for j in (this, replace(this, keeps_scores=True)))
    assert kept.kept.activations - without.kept.activations == 2 * passes * layer and kept.temporary == without.temporary
    full = replace(this, work=replace(this.work, recomputed=1.0))
    without, kept = (memory.on_rank(j, rank) for j in (full, replace(full, keeps_scores=True)))
    assert kept.kept == without.kept and kept.temporary - without.temporary in (0, layer)
