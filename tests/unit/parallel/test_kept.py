"""What a rank of a pipeline keeps: against every pass of its order."""

import random

import pytest

from internevo.parallel.kept import points
from internevo.parallel.messages import Plan, kept
from internevo.parallel.orders import orders, rank_of, stages_on


@pytest.mark.parametrize(
    ("schedule", "ranks", "chunks", "micro_batches"),
    [("1F1B", 1, 1, 3), ("1F1B", 4, 1, 9), ("1F1B", 3, 2, 7), ("ZBH1", 4, 1, 10), ("ZBV", 3, 2, 8)],
)
def test_the_most_that_a_rank_keeps_is_at_one_of_the_points(schedule: str, ranks: int, chunks: int, micro_batches: int) -> None:
    stages, drawn = [rank_of(stage, ranks, schedule) for stage in range(ranks * chunks)], random.Random(1)
    for rank in range(ranks):
        planned = Plan.of(rank, orders(schedule, ranks, chunks, micro_batches), stages)
        found = points(schedule, ranks, chunks, micro_batches, rank)
        assert len(found) < len(planned.order)
        for _ in range(20):
            of = stages_on(rank, ranks, chunks, schedule)
            size = {(kind, stage): drawn.choice([1, 5, 30]) for kind in "FB" for stage in of}
            size |= {("B", stage): 0 for stage in of if schedule == "1F1B"}
            now, message, totals = 0, drawn.choice([1, 9]), dict[object, int]()
            for action, messages in zip(planned.order, kept(planned, rank, stages), strict=True):
                kind, stage, _ = action
                now += size.get((kind, stage), 0) - (size["F", stage] if kind == "B" else size["B", stage] * (kind == "W"))
                if kind == "F" or (kind == "B" and schedule != "1F1B"):
                    totals[action] = now + message * messages
            in_points = {
                point.after: sum(size["F", stage] * count for stage, count in zip(of, point.forward, strict=True))
                + sum(size["B", stage] * count for stage, count in zip(of, point.backward, strict=True))
                + message * point.messages
                for point in found
            }
            assert in_points.items() <= totals.items() and max(in_points.values()) == max(totals.values())
