"""The pool of processes, on which the tests with several processes depend."""

import os
import time
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from internevo.parallel.world import World
from tests import pool as module
from tests.pool import Pool


@pytest.fixture(scope="module")
def two() -> Iterator[Pool]:
    """A pool whose processes may die."""
    pool = Pool()
    yield pool
    pool.stop()


def add_up(world: World, numbers: torch.Tensor) -> tuple[int, torch.Tensor]:
    total = (numbers + world.rank).to(world.device)
    dist.all_reduce(total)
    return world.rank, total.cpu()


def fail_on(world: World, rank: int, how: str) -> None:
    """Fails on one rank, while the others do not end."""
    if world.rank != rank:
        time.sleep(3600)
    if how == "raise":
        raise ValueError("the reason")
    os._exit(7)


def test_a_function_runs_in_a_process_group_and_the_results_of_all_ranks_are_returned(two: Pool) -> None:
    for processes, wanted in ((1, [1.5, 2.0]), (2, [4.0, 5.0])):
        results = two.run(add_up, processes, torch.tensor([1.5, 2.0]))
        assert [(rank, total.tolist()) for rank, total in results] == [(rank, wanted) for rank in range(processes)]


def test_the_rank_that_failed_is_shown_and_the_others_are_not_waited_for(two: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.1)
    with pytest.raises(AssertionError, match=r"(?s)^rank 1: Traceback.*\nValueError: the reason\n\nrank 0 did not finish$"):
        two.run(fail_on, 2, 1, "raise")


def test_a_process_that_ends_is_named_and_the_next_job_gets_new_processes(two: Pool) -> None:
    with pytest.raises(AssertionError, match="^rank 0: the process ended with exit code 7$"):
        two.run(fail_on, 1, 0, "exit")
    assert two.run(add_up, 1, torch.zeros(1)) == [(0, torch.zeros(1))]


def test_a_rank_that_does_not_finish_in_time_is_named(two: Pool) -> None:
    with pytest.raises(AssertionError, match="^rank 0 did not finish$"):
        two.run(fail_on, 1, 1, "raise", timeout=0.1)
