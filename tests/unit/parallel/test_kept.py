"""What a rank of a pipeline keeps: against every pass of its order."""

from collections import Counter

import pytest

from internevo.parallel.kept import points
from internevo.parallel.messages import Plan, kept
from internevo.parallel.orders import orders, rank_of, stages_on


@pytest.mark.parametrize(
    ("schedule", "ranks", "chunks", "micro_batches"),
    [("1F1B", 1, 1, 3), ("1F1B", 4, 1, 9), ("1F1B", 3, 2, 7), ("ZBH1", 4, 1, 10), ("ZBV", 3, 2, 8)],
)
def test_no_pass_is_left_out_after_which_a_rank_keeps_something_else(
    schedule: str, ranks: int, chunks: int, micro_batches: int
) -> None:
    stages = [rank_of(stage, ranks, schedule) for stage in range(ranks * chunks)]
    for rank in range(ranks):
        planned = Plan.of(rank, orders(schedule, ranks, chunks, micro_batches), stages)
        messages, seen = kept(planned, rank, stages), dict[object, object]()
        count = Counter[tuple[str, int]]()
        for action, now in zip(planned.order, messages, strict=True):
            count[action.kind, action.stage] += 1
            if action.kind == "F" or (action.kind == "B" and schedule != "1F1B"):
                of = stages_on(rank, ranks, chunks, schedule)
                forward = tuple(count["F", stage] - count["B", stage] for stage in of)
                backward = tuple(count["B", stage] - count["W", stage] for stage in of)
                seen[forward, backward, now] = action
        found = points(schedule, ranks, chunks, micro_batches, rank)
        assert {(p.forward, p.backward, p.messages) for p in found} == set(seen)
        assert set(seen.values()) <= {p.after for p in found}
