"""The memory of a rank, by formula. (``tests/parallel/test_memory.py`` compares it with real steps.)"""

import pytest

from internevo.config import validate
from internevo.models.families.registry import decoder_config
from internevo.parallel import plan
from internevo.parallel.layout import Layout
from internevo.parallel.strategy import Workload
from tests.conftest import tiny


def work(mode: str, chunks: int, ranks: int, micro_batches: int, rank: int = 0, **changes: object) -> Workload:
    pipeline = {"size": ranks, "mode": mode}
    config = validate(tiny(model__num_layers=6, model__num_chunks=chunks, parallel__pipeline=pipeline, **changes))
    decoder, layout = decoder_config(config.model_type, config.model), Layout.from_config(config, 2 * ranks)
    return Workload.from_config(decoder, config, layout, micro_batches, "cpu", 2 * rank)


@pytest.mark.parametrize(("mode", "chunks"), [("1F1B", 1), ("1F1B", 2), ("ZBH1", 1), ("ZBV", 2)])
@pytest.mark.parametrize("recomputed", [False, True])
def test_few_micro_batches_say_what_many_need(
    monkeypatch: pytest.MonkeyPatch, mode: str, chunks: int, recomputed: bool
) -> None:
    more = {"model__checkpoint": recomputed, "model__dtype": "torch.bfloat16"}
    asked = [work(mode, chunks, 3, count, rank, **more) for rank in range(3) for count in (36, 37, 38)]
    short = [plan.memory(each) for each in asked]
    monkeypatch.setattr(plan, "_enough", lambda micro_batches, ranks: micro_batches)
    for mine, theirs in zip(short, map(plan.memory, asked), strict=True):
        assert (mine.total, mine.state) == (theirs.total, theirs.state)
        assert mine.after.micro_batch <= theirs.after.micro_batch


def test_any_number_of_micro_batches_takes_no_time() -> None:
    assert plan.memory(work("ZBV", 2, 3, 10**9)) == plan.memory(work("ZBV", 2, 3, 10**9 + 3))
    assert plan.memory(work("1F1B", 1, 1, 10**9)).after.kind == "F"


def test_later_ranks_of_1f1b_keep_fewer_micro_batches() -> None:
    kept = [plan.memory(work("1F1B", 1, 3, 6, rank)).activations for rank in range(3)]
    assert kept[0] > kept[1] > kept[2]
