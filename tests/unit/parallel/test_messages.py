"""Messages of a pipeline, over a stand-in for NCCL: the first message of a group waits on the host for the other rank, and a
rank that needs its whole GPU, as to load a kernel, waits for everything that it is receiving."""

import threading
from collections import defaultdict
from concurrent.futures import Future, ThreadPoolExecutor
from queue import Queue
from typing import Any

import pytest
import torch
from torch import Tensor

from internevo.parallel import messages
from internevo.parallel.messages import Channels, kept
from internevo.parallel.orders import needs, orders, rank_of

PATIENCE = 5.0


class Link:
    """A process group of two ranks."""

    def __init__(self) -> None:
        self.connection = threading.Barrier(2, timeout=PATIENCE)
        self.connected: set[int] = set()
        self.carried: Queue[Tensor] = Queue()

    def connect(self, rank: int) -> None:
        if rank not in self.connected:
            self.connection.wait()
            self.connected.add(rank)


class Receiving:
    def __init__(self, link: Link, tensor: Tensor) -> None:
        self.link, self.tensor, self.done = link, tensor, False

    def wait(self) -> None:
        if not self.done:
            self.tensor.copy_(self.link.carried.get(timeout=PATIENCE))
            self.done = True


class Nccl:
    """The functions of ``torch.distributed`` that ``messages`` uses. Each thread is a rank."""

    def __init__(self) -> None:
        self.thread = threading.local()
        self.links: defaultdict[Any, Link] = defaultdict(Link)
        self.lock = threading.Lock()

    def get_rank(self) -> int:
        rank: int = self.thread.rank
        return rank

    def get(self, partition: list[list[int]], purpose: str = "") -> Link:
        with self.lock:
            own = next((tuple(ranks) for ranks in partition if self.get_rank() in ranks), (self.get_rank(),))
            return self.links[purpose, own]

    def isend(self, tensor: Tensor, peer: int, group: Link) -> "Future[None]":
        group.connect(self.get_rank())
        group.carried.put(tensor)
        sent: Any = Future()
        sent.wait = lambda: None
        return sent

    def irecv(self, tensor: Tensor, peer: int, group: Link) -> Receiving:
        group.connect(self.get_rank())
        self.thread.posted.append(Receiving(group, tensor))
        return self.thread.posted[-1]

    def send(self, tensor: Tensor, peer: int, group: Link) -> None:
        self.isend(tensor, peer, group)

    def recv(self, tensor: Tensor, peer: int, group: Link) -> None:
        self.irecv(tensor, peer, group).wait()


@pytest.mark.parametrize(("mode", "chunks"), [("1F1B", 1), ("1F1B", 2), ("ZBH1", 1), ("ZBV", 2)])
@pytest.mark.parametrize("waiting", [0, 1, 2])
def test_no_rank_waits_for_itself_or_keeps_more_messages_than_stated(
    monkeypatch: pytest.MonkeyPatch, mode: str, chunks: int, waiting: int
) -> None:
    nccl, ranks, stages, micro_batches = Nccl(), 3, 3 * chunks, 20
    most = [0] * ranks
    monkeypatch.setattr(messages, "dist", nccl)
    all_orders = orders(mode, ranks, chunks, micro_batches)

    def run(rank: int) -> None:
        nccl.thread.rank, nccl.thread.posted = rank, []
        ranks_of_stages = [rank_of(stage, ranks, mode) for stage in range(stages)]
        groups: Any = nccl
        channels = Channels(groups, [list(range(ranks))], ranks_of_stages, torch.device("cpu"), torch.float32)
        plan = channels.plan(all_orders)
        channels.expect(plan, (2,))
        for action, count in zip(plan.order, kept(plan, rank, ranks_of_stages), strict=True):
            for receiving in nccl.thread.posted if rank == waiting else []:
                receiving.wait()
            needed = needs(action, stages)
            if needed is not None and needed.stage != action.stage:
                assert channels.take(needed).tolist() == [needed.stage, needed.micro_batch]
            channels.send(action, torch.tensor([action.stage, action.micro_batch], dtype=torch.float32))
            ahead = sum(len(inbox._arrived) + (inbox._receiving is not None) for inbox in channels._in.values())
            assert ahead + sum(len(outbox._sending) for outbox in channels._out.values()) + len(channels._here) == count
            most[rank] = max(most[rank], count)
        channels.wait()

    with ThreadPoolExecutor(ranks) as pool:
        list(pool.map(run, range(ranks)))
    assert max(most) <= 2 * ranks * chunks  # not as many as micro-batches
