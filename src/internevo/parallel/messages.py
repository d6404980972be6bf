"""Messages between pipeline ranks: point-to-point, of known shape, and in each direction over a process group of its own.

On a GPU the messages of a group run one after the other. If both directions shared a group, two ranks could each wait for the
other one to receive. A channel carries its messages in the order in which the sender sends them, which both sides know.

NCCL connects two ranks when the first message of a group is sent, and until then the host waits for the other rank. So every
channel carries a message when it is made.

A rank is already receiving the next message while it computes, but only if that message does not wait for something that this
rank still has to send: while a GPU is receiving, it may not be able to load a kernel or to free memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import chain, pairwise
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .orders import Action, Order, goes_to, sends_before
from .views import Groups

DOWN, UP = "down", "up"
"""What the two process groups of two neighbours are for: messages to the higher rank, and to the lower."""


def rounds(ranks_of_stages: Sequence[int]) -> list[list[tuple[int, int]]]:
    """Returns the pairs of pipeline ranks with neighbouring stages, in rounds: a rank is in at most one pair of a round."""
    links = {(min(pair), max(pair)) for pair in pairwise(ranks_of_stages)}
    found: list[list[tuple[int, int]]] = []
    for a, b in sorted((a, b) for a, b in links if a != b):
        free = next((pairs for pairs in found if not {a, b} & {*chain(*pairs)}), None)
        if free is None:
            found.append(free := [])
        free.append((a, b))
    return found


class Outbox:
    """Sends tensors to one rank, and keeps each of them alive until it has been sent."""

    def __init__(self, group: dist.ProcessGroup, peer: int) -> None:
        """``peer``: the receiver's rank in the world."""
        self.group, self.peer = group, peer
        self._sending: deque[tuple[dist.Work, Tensor]] = deque()

    def send(self, tensor: Tensor) -> None:
        """Starts to send a tensor."""
        while self._sending and self._sending[0][0].is_completed():
            self._sending.popleft()
        tensor = tensor.detach().contiguous()
        work = dist.isend(tensor, self.peer, self.group)
        assert work is not None
        self._sending.append((work, tensor))

    def wait(self) -> None:
        """Waits until everything has been sent."""
        while self._sending:
            self._sending.popleft()[0].wait()


class Expected(NamedTuple):
    """A result that another rank will send to this one."""

    result_of: Action
    sends_before: int
    """How many results this rank sends before this one can come."""


class Plan(NamedTuple):
    """What a rank runs and receives."""

    order: Order
    expected: dict[int, list[Expected]]
    """Sender -> its results, in the order in which it sends them."""


class Inbox:
    """Receives tensors from one rank: one at a time, in the order in which they are sent."""

    def __init__(self, group: dist.ProcessGroup, peer: int) -> None:
        """``peer``: the sender's rank in the world."""
        self.group, self.peer = group, peer
        self._expected: deque[Expected] = deque()
        self._buffer = torch.empty(0)
        self._receiving: tuple[Action, dist.Work, Tensor] | None = None
        self._arrived: dict[Action, Tensor] = {}

    def expect(self, results: Sequence[Expected], like: Tensor) -> None:
        """Says which results will come.

        Args:
            like: a tensor of the same shape, dtype and device.
        """
        assert not self._expected and self._receiving is None and not self._arrived
        self._expected, self._buffer = deque(results), like

    def receive(self, sent: int) -> None:
        """Starts to receive the next result, unless one is being received, or the next one waits for this rank.

        Args:
            sent: how many results this rank has sent.
        """
        if self._receiving is None and self._expected and self._expected[0].sends_before <= sent:
            tensor = torch.empty_like(self._buffer)
            work = dist.irecv(tensor, self.peer, self.group)
            assert work is not None
            self._receiving = self._expected.popleft().result_of, work, tensor

    def take(self, result_of: Action, sent: int) -> Tensor:
        """Waits for the result of an action, and starts to receive the next one."""
        while result_of not in self._arrived:
            assert self._receiving is not None
            action, work, tensor = self._receiving
            work.wait()
            self._arrived[action], self._receiving = tensor, None
            self.receive(sent)
        return self._arrived.pop(result_of)


class Channels:
    """The channels of a rank to and from the other ranks of its pipeline."""

    def __init__(
        self,
        groups: Groups,
        pipelines: Sequence[Sequence[int]],
        ranks_of_stages: Sequence[int],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Makes the process groups. Every rank must call it.

        Args:
            pipelines: the ranks in the world of each pipeline.
            ranks_of_stages: the pipeline rank of each stage.
            dtype: dtype of the tensors.
        """
        self.device, self.dtype = device, dtype
        self.rank_of, self.stages = ranks_of_stages, len(ranks_of_stages)
        self.first = pipelines[0]
        """The ranks of the first pipeline, by their numbers in the world."""
        self.ranks = next(ranks for ranks in pipelines if dist.get_rank() in ranks)
        """The same of this pipeline."""
        self.rank, self.size = self.ranks.index(dist.get_rank()), len(self.ranks)
        self._out: dict[int, Outbox] = {}
        self._in: dict[int, Inbox] = {}
        self._here: dict[Action, Tensor] = {}
        self._sent = 0
        """How many results of the current plan have been sent to other ranks."""
        for links in rounds(ranks_of_stages):
            pairs = [[ranks[n] for n in pair] for ranks in pipelines for pair in links]
            both_ways = [groups.get(pairs, way) for way in (DOWN, UP)]
            for a, b in links:
                if self.rank in (a, b):
                    out, back = both_ways if self.rank == a else reversed(both_ways)
                    peer = b if self.rank == a else a
                    self._out[peer], self._in[peer] = Outbox(out, self.ranks[peer]), Inbox(back, self.ranks[peer])
                    self._connect(self.ranks[peer], out, back, first=self.rank == a)

    def _connect(self, peer: int, out: dist.ProcessGroup, back: dist.ProcessGroup, first: bool) -> None:
        """Sends a message to another rank and receives one from it. ``first``: whether this rank sends first."""
        message = torch.zeros(1, device=self.device)
        if first:
            dist.send(message, peer, out)
        dist.recv(message, peer, back)
        if not first:
            dist.send(message, peer, out)

    def plan(self, orders: Sequence[Order]) -> Plan:
        """Returns what this rank does when all ranks follow their orders."""
        before = sends_before(orders, self.rank)
        return Plan(orders[self.rank], {
            sender: [Expected(action, before[action]) for action in orders[sender] if self._receiver(action) == self.rank]
            for sender in self._in
        })  # fmt: skip

    def expect(self, plan: Plan, shape: Sequence[int]) -> None:
        """Prepares to receive what comes from the other ranks, tensors of ``shape``."""
        like, self._sent = torch.empty(*shape, dtype=self.dtype, device=self.device), 0
        for sender, inbox in self._in.items():
            inbox.expect(plan.expected[sender], like)
            inbox.receive(self._sent)

    def send(self, result_of: Action, tensor: Tensor) -> None:
        """Starts to send the result of an action to the rank that needs it."""
        receiver = self._receiver(result_of)
        if receiver == self.rank:
            self._here[result_of] = tensor.detach()
        elif receiver is not None:
            self._out[receiver].send(tensor)
            self._sent += 1
            for inbox in self._in.values():
                inbox.receive(self._sent)

    def take(self, result_of: Action) -> Tensor:
        """Waits for the result of an action of another stage."""
        sender = self.rank_of[result_of.stage]
        return self._here.pop(result_of) if sender == self.rank else self._in[sender].take(result_of, self._sent)

    def wait(self) -> None:
        """Waits until everything has been sent."""
        for outbox in self._out.values():
            outbox.wait()

    def _receiver(self, action: Action) -> int | None:
        stage = goes_to(action, self.stages)
        return None if stage is None else self.rank_of[stage]
