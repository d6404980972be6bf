"""Work in turns: whatever the machines and however long each rank takes, none comes before those whose files it may find."""

import socket
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from internevo.errors import InternEvoError, UsageError
from internevo.parallel import turns
from internevo.parallel.turns import in_turns
from internevo.parallel.world import World

HOST = threading.local()


class Ranks:
    """Threads that act as ranks on hosts. Each has its own store in a real run; here they share one."""

    def __init__(self, hosts: list[str]) -> None:
        self.hosts, self.store = hosts, dist.HashStore()
        self.results: list[Any] = [None] * len(hosts)

    def run(self, work: Callable[[int], Any], delays: list[float], doing: Callable[[str], Any] = nullcontext) -> list[Any]:
        """Returns what each rank has returned or raised."""

        def act(rank: int) -> None:
            HOST.name = self.hosts[rank]
            time.sleep(delays[rank])
            world = World(rank, len(self.hosts), 0, torch.device("cpu"), self.store)
            try:
                self.results[rank] = in_turns(world, "work", lambda: work(rank), doing)
            except Exception as error:
                self.results[rank] = error

        threads = [threading.Thread(target=act, args=(rank,), daemon=True) for rank in range(len(self.hosts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
        return self.results


@pytest.fixture(autouse=True)
def _hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: HOST.name)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_a_rank_finds_what_the_ranks_before_it_have_left(data: st.DataObject) -> None:
    hosts = data.draw(st.lists(st.sampled_from("abc"), min_size=1, max_size=7))
    times = st.lists(st.sampled_from([0.0, 0.01, 0.05]), min_size=len(hosts), max_size=len(hosts))
    delays, lasts = data.draw(times), data.draw(times)
    shared, disks = data.draw(st.booleans()), dict[str, int]()
    working: dict[str, list[int]] = {host: [] for host in hosts}
    ended: list[int] = []

    def work(rank: int) -> int:
        disk = "all" if shared else hosts[rank]
        if disk not in disks:
            working[hosts[rank]].append(rank)
            time.sleep(lasts[rank])
            assert disk not in disks, "two ranks have made the same file"
            disks[disk] = rank
        ended.append(rank)
        return rank

    assert Ranks(hosts).run(work, delays) == list(range(len(hosts)))
    assert disks == {"all": 0} if shared else disks.keys() == set(hosts) and disks[hosts[0]] == 0
    assert ended[0] == 0 and sorted(ended) == list(range(len(hosts)))


@pytest.mark.parametrize("failing", [0, 1, 3])
@pytest.mark.parametrize("kind", [UsageError, InternEvoError, ValueError])
def test_a_failure_of_one_rank_is_said_by_all(failing: int, kind: type[Exception]) -> None:
    """Ranks 0 and 1 are on one machine, 2 and 3 on another."""
    began = []

    def work(rank: int) -> None:
        began.append(rank)
        if rank == failing:
            raise kind("no such dataset")

    found = Ranks(["a", "a", "b", "b"]).run(work, [0.0] * 4)
    assert all("no such dataset" in str(error) for error in found), found
    assert {type(error) for error in found} <= {kind, UsageError if kind is UsageError else InternEvoError}
    assert began == [0] if failing == 0 else failing in began


def test_no_rank_goes_on_before_all_have_done_it_and_a_long_wait_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "QUIET", 0.05)
    said: list[str] = []

    def doing(what: str) -> AbstractContextManager[None]:
        said.append(what)
        return nullcontext()

    ended = []
    begin = time.monotonic()

    def work(rank: int) -> float:
        time.sleep(0.3 if rank == 2 else 0.0)
        ended.append(rank)
        return time.monotonic() - begin

    ranks = Ranks(["a", "a", "b"])
    ranks.run(work, [0.0] * 3, doing)
    assert time.monotonic() - begin >= 0.3 and ended[-1] == 2
    assert said == ["waiting for other ranks: work"] * 2


def test_a_rank_does_not_wait_for_ever_for_one_that_was_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "LONGEST", timedelta(seconds=0.2))
    ranks = Ranks(["a", "a"])
    HOST.name = "a"
    ranks.store.set("turns of work/first host", "a")
    with pytest.raises(InternEvoError, match="waited for 0:00:00.200000 for a rank on a: work; the rank may have been killed"):
        in_turns(World(1, 2, 0, torch.device("cpu"), ranks.store), "work", lambda: None)
