"""The watchdog: alarms, the answers of the ranks, the report, and how long a step may take."""

import math
import threading
import time

import pytest
import torch
import torch.distributed as dist

from internevo.parallel.world import World
from internevo.train.watchdog import NO_ANSWER, RollCall, Watchdog

ALONE = World(0, 1, 0, torch.device("cpu"), dist.HashStore())


def roll_calls(size: int, interval: float = 20.0) -> list[RollCall]:
    """Makes the roll calls of all ranks, with one store."""
    store = dist.HashStore()
    return [RollCall(store, rank, size, interval) for rank in range(size)]


def answer(calls: list[RollCall], answers: dict[int, str]) -> dict[int, str]:
    """Lets ranks answer at the same time. Returns the report that each of them gets."""
    reports: dict[int, str] = {}

    def ask(rank: int) -> None:
        reports[rank] = calls[rank].report(answers[rank])

    threads = [threading.Thread(target=ask, args=(rank,)) for rank in answers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return reports


def test_all_ranks_get_the_same_report_and_the_rarest_answer_comes_first() -> None:
    calls = roll_calls(5)
    assert not any(call.alarmed() for call in calls)
    calls[2].alarm("a step is slow")
    calls[0].alarm("it is slow here as well")
    assert all(call.alarmed() for call in calls)
    reports = answer(calls, {0: "at a", 1: "at a", 2: "at a", 3: "at b", 4: "at a"})
    assert len(reports) == 5
    assert set(reports.values()) == {"the run cannot continue: a step is slow\n  rank 3: at b\n  ranks 0-2, 4: at a"}


def test_a_rank_without_an_answer_is_named_first() -> None:
    calls = roll_calls(4, interval=0.1)
    calls[0].alarm("a step is slow")
    for call in calls[1:3]:
        call._answer("at b")
    assert calls[0].report("at a").splitlines()[1:] == [f"  rank 3: {NO_ANSWER}", "  rank 0: at a", "  ranks 1-2: at b"]


def test_the_failure_of_a_rank_that_has_ended_is_in_the_report() -> None:
    calls = roll_calls(3)
    calls[1].leave("has failed: DataError: no more data")
    assert calls[0].alarmed()
    reports = answer(calls, {0: "at a", 2: "at a"})
    assert "rank 1 has failed\n  rank 1: has failed: DataError: no more data\n" in reports[0]


def test_a_rank_that_has_finished_raises_no_alarm() -> None:
    calls = roll_calls(2)
    calls[0].leave("")
    assert not calls[1].alarmed()
    calls[1].alarm("a step is slow")
    assert "rank 0: has finished" in calls[1].report("at a")


def test_a_step_may_take_the_limit_or_several_times_the_slowest_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("internevo.train.watchdog.time.monotonic", lambda: now[0])
    dog = Watchdog(ALONE, limit=100)
    allowed = []
    for seconds, tokens in ((1000, 10), (5, 10), (400, 10), (5, 10), (5, 20)):
        with dog.step(tokens):
            allowed.append(dog.allowed)
            now[0] += seconds
        assert dog.allowed is None
    # The first step has no limit. It counts as the slowest only for the second step.
    assert allowed == [math.inf, 5000, 100, 2000, 4000]


def test_without_a_limit_a_step_may_take_any_time() -> None:
    dog = Watchdog(ALONE, limit=0)
    for _ in range(3):
        with dog.step(1):
            assert dog.allowed == math.inf


def test_a_step_that_fails_is_no_longer_timed() -> None:
    dog = Watchdog(ALONE, limit=100)
    with dog.step(1):
        pass
    with pytest.raises(ValueError, match="boom"), dog.step(1):
        raise ValueError("boom")
    assert dog.allowed is None


@pytest.mark.parametrize(("error", "called"), [(ValueError, True), (KeyboardInterrupt, False)])
def test_before_end_is_called_after_a_failure_and_not_after_ctrl_c(error: type[BaseException], called: bool) -> None:
    given: list[float] = []
    with pytest.raises(error), Watchdog(ALONE, limit=100) as dog:
        dog.before_end = given.append
        raise error
    assert bool(given) == called


def test_the_time_between_steps_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation or a checkpoint may take longer than a step."""
    ended: list[str] = []
    monkeypatch.setattr(Watchdog, "_end", lambda self, roll: ended.append("ended"))
    world = World(0, 2, 0, torch.device("cpu"), dist.HashStore())
    with Watchdog(world, limit=1.5, interval=0.05) as dog:
        for _ in range(2):
            with dog.step(1):
                time.sleep(0.01)
        time.sleep(2.2)
        with dog.step(1):
            time.sleep(0.1)
        assert not ended
        with dog.step(1):
            time.sleep(2.6)
        assert ended


def test_a_rank_that_fails_tells_the_others_before_it_waits_for_its_checkpoint() -> None:
    world = World(1, 2, 1, torch.device("cpu"), dist.HashStore())
    alarmed: list[bool] = []
    with pytest.raises(ValueError, match="boom"), Watchdog(world, limit=100, interval=0.05) as dog:
        dog.before_end = lambda patience: alarmed.append(world.store.check(["watchdog/alarm", "watchdog/rank 1"]))
        raise ValueError("boom")
    assert alarmed == [True]


def test_without_the_launcher_a_run_may_finish_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher has the store. If rank 0 has it instead, the loss of the store ends the run."""
    ended, asked = threading.Event(), threading.Event()
    monkeypatch.setattr(Watchdog, "_end", lambda self, roll: ended.set())

    def fail(roll: RollCall) -> bool:
        raise RuntimeError("no store")

    monkeypatch.setattr(RollCall, "alarmed", fail)
    world = World(0, 2, 0, torch.device("cpu"), dist.HashStore())
    with Watchdog(world, limit=100, interval=0.05) as dog:
        dog.on_lost_store = asked.set
        with dog.step(1):
            assert asked.wait(60)
            assert not ended.wait(0.5)
        dog.on_lost_store = None
        with dog.step(1):
            assert ended.wait(60)
