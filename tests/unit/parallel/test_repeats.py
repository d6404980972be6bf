"""Steps of few micro-batches that show what happens in steps of many."""

import pytest

from internevo.parallel.orders import FORWARD, rank_of
from internevo.parallel.repeats import LEAST, shortened, situations


@pytest.mark.parametrize("micro_batches", [1, 2, 3, 4, 12, 37])
@pytest.mark.parametrize(
    ("mode", "ranks", "chunks"), [("1F1B", 1, 1), ("1F1B", 4, 1), ("1F1B", 4, 2), ("ZBH1", 4, 1), ("ZBV", 3, 2)]
)
def test_every_pass_has_an_example_in_the_same_situation(mode: str, ranks: int, chunks: int, micro_batches: int) -> None:
    on = [rank_of(stage, ranks, mode) for stage in range(ranks * chunks)]
    for rank in range(ranks):
        whole = situations(mode, ranks, chunks, micro_batches, rank, on)
        count, examples = shortened(mode, ranks, chunks, micro_batches, rank, on)
        run = situations(mode, ranks, chunks, count, rank, on)
        assert list(examples) == list(whole) and min(LEAST, micro_batches) <= count <= micro_batches
        assert all(run[example] == whole[action] for action, example in examples.items())
        assert set(run.values()) == set(whole.values())  # so that the most memory is the same


def test_a_rank_needs_as_many_micro_batches_as_it_keeps() -> None:
    assert shortened("1F1B", 1, 1, 100, 0, [0])[0] == 3
    on = list(range(8))
    counts = [shortened("1F1B", 8, 1, 100, rank, on)[0] for rank in on]
    assert counts == sorted(counts, reverse=True) and counts[0] < 12 and counts[-1] < 5


def test_first_and_last_micro_batches_are_their_own_examples() -> None:
    count, examples = shortened("1F1B", 2, 1, 50, 0, [0, 1])
    firsts = {action.micro_batch: example.micro_batch for action, example in examples.items() if action.kind == FORWARD}
    assert (firsts[0], firsts[49]) == (0, count - 1)
