"""The timeline of a pipeline: what its ranks have recorded, and the same schedule simulated."""

import pytest

from internevo.measure.timeline import timeline
from internevo.parallel.orders import Action, bubble, orders, play
from internevo.parallel.spans import Span


@pytest.mark.parametrize(("mode", "chunks"), [("1F1B", 1), ("1F1B", 2), ("ZBH1", 1), ("ZBV", 2)])
def test_ranks_that_follow_their_schedule_are_idle_as_long_as_in_the_simulation(mode: str, chunks: int) -> None:
    seconds = {"F": 0.02, "B": 0.03, "W": 0.01}
    played = play(orders(mode, 3, chunks, 6), lambda action: seconds[action.kind] * (2 if action.stage == 1 else 1))
    recorded = [[Span(action.kind, action, 1e9 + start, 1e9 + end) for action, start, end in rank] for rank in played]
    recorded[1].insert(0, Span("wait", Action("F", 0, 0), 1e9 - 0.5, 1e9 + 0.02))
    recorded[1].append(Span("send", Action("B", 1, 5), 1e9 + 8, 1e9 + 9))
    found = timeline(recorded, mode)
    assert (found["schedule"], found["chunks"], found["micro_batches"]) == (mode, chunks, 6)
    assert found["idle"] == pytest.approx(bubble(played)) and found["idle_played"] == pytest.approx(bubble(played))
    assert found["ranks"][0][0] == ["F", 0, 0, 0.0, pytest.approx(0.02)]
    assert found["ranks"][1][0] == ["wait", 0, 0, pytest.approx(-0.5), pytest.approx(0.02)]


def test_idle_time_that_the_schedule_does_not_have() -> None:
    """One rank runs two passes with a pause between them: idle for a third of the time, and not at all if simulated."""
    forward, backward = Action("F", 0, 0), Action("B", 0, 0)
    found = timeline([[Span("F", forward, 5.0, 6.0), Span("B", backward, 7.0, 8.0)]], "1F1B")
    assert found["idle"] == pytest.approx(1 / 3) and found["idle_played"] == pytest.approx(0.0)
