"""Messages between pipeline ranks: point-to-point, of known shapes, and in each direction over a process group of its own. A
message is one or several tensors, which are sent one after the other.

On a GPU the messages of a group run one after the other. If both directions shared a group, two ranks could each wait for the
other one to receive. A channel carries its messages in the order in which the sender sends them, which both sides know.

NCCL connects two ranks when the first message of a group is sent, and until then the host waits for the other rank. So every
channel carries a message when it is made.

A rank is already receiving the next message while it computes, but only if that message does not wait for something that this
rank still has to send: while a GPU is receiving, it may not be able to load a kernel or to free memory.

A rank keeps what it sends until a message from the receiver shows that it has arrived there (``Expected.arrived``), or until
the end of the step. So the most messages that a rank keeps follow from the orders (``kept``). Only NCCL can also say that
something has been sent; then it is freed earlier.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, pairwise
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .orders import Action, Order, Turn, goes_to, needs, sends_before
from .spans import SEND, WAIT, Spans
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


def pairs(pipelines: Sequence[Sequence[int]], links: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Returns the ranks in the world of these pairs of pipeline ranks, in all pipelines."""
    return [[ranks[n] for n in pair] for ranks in pipelines for pair in links]


Message = Sequence[Tensor]
"""The tensors of one message."""


class Outbox:
    """Sends messages to one rank, and keeps the tensors of each alive until it is known to have arrived."""

    def __init__(self, group: dist.ProcessGroup, peer: int) -> None:
        """``peer``: the receiver's rank in the world."""
        self.group, self.peer = group, peer
        self._sending: deque[tuple[list[dist.Work], Message]] = deque()
        self._arrived = 0

    def send(self, message: Message) -> None:
        """Starts to send a message."""
        while self._sending and all(work.is_completed() for work in self._sending[0][0]):
            self.arrived(self._arrived + 1)
        tensors = [tensor.detach().contiguous() for tensor in message]
        self._sending.append((_started(dist.isend(tensor, self.peer, self.group) for tensor in tensors), tensors))

    def arrived(self, count: int) -> None:
        """Frees the first ``count`` messages of the current plan, because they have arrived."""
        for _ in range(count - self._arrived):
            _wait(self._sending.popleft()[0])
            self._arrived += 1

    def wait(self) -> None:
        """Waits until everything has been sent."""
        self.arrived(self._arrived + len(self._sending))
        self._arrived = 0


def _started(works: Iterable[dist.Work | None]) -> list[dist.Work]:
    return [work for work in works if work is not None]  # there is none only if this rank is not in the group


def _wait(works: Sequence[dist.Work]) -> None:
    for work in works:
        work.wait()


class Expected(NamedTuple):
    """A result that another rank will send to this one."""

    result_of: Action
    sends_before: int
    """How many results this rank sends before this one can come."""
    arrived: int
    """How many results of this rank have arrived at the sender before it sends this one."""


class Plan(NamedTuple):
    """What a rank runs and receives."""

    order: Order
    expected: dict[int, list[Expected]]
    """Sender -> its results, in the order in which it sends them."""

    @classmethod
    def of(
        cls, rank: int, orders: Sequence[Order], ranks_of_stages: Sequence[int], turns: Iterable[Turn] | None = None
    ) -> Plan:
        """Returns what a rank does when all ranks follow their orders. (``turns``: as for ``sends_before``.)"""
        before, expected = sends_before(orders, rank, turns), dict[int, list[Expected]]()
        for sender in {*chain(*(pair for pair in pairwise(ranks_of_stages) if rank in pair))} - {rank}:
            sent = [action for action in orders[rank] if _receiver(action, ranks_of_stages) == sender]
            number, arrived = {action: n for n, action in enumerate(sent, start=1)}, 0
            expected[sender] = []
            for action in orders[sender]:
                needed = needs(action, len(ranks_of_stages))
                arrived = max(arrived, number.get(needed, 0) if needed else 0)
                if _receiver(action, ranks_of_stages) == rank:
                    expected[sender].append(Expected(action, before[action], arrived))
        return cls(orders[rank], expected)


def _receiver(action: Action, ranks_of_stages: Sequence[int]) -> int | None:
    """Returns the rank that needs the result of an action; None if there is none."""
    stage = goes_to(action, len(ranks_of_stages))
    return None if stage is None else ranks_of_stages[stage]


def kept(plan: Plan, rank: int, ranks_of_stages: Sequence[int]) -> list[int]:
    """Returns how many messages a rank keeps at most after each action of its plan.

    Those are what it receives ahead of its use, and what it has sent and does not know to have arrived. (The input of a stage
    is one of its activations.)
    """
    coming = {sender: deque(expected) for sender, expected in plan.expected.items()}
    receiving, ahead, here = dict[int, Expected](), set[Action](), 0
    sent, arrived, results = Counter[int](), Counter[int](), list[int]()

    def receive(sender: int) -> None:
        if sender not in receiving and coming[sender] and coming[sender][0].sends_before <= sent.total():
            receiving[sender] = coming[sender].popleft()

    for sender in coming:
        receive(sender)
    for action in plan.order:
        needed, receiver = needs(action, len(ranks_of_stages)), _receiver(action, ranks_of_stages)
        if needed is not None and needed.stage != action.stage:
            sender = ranks_of_stages[needed.stage]
            here -= sender == rank
            while sender != rank and needed not in ahead:
                result = receiving.pop(sender)
                ahead.add(result.result_of)
                arrived[sender] = result.arrived
                receive(sender)
            ahead.discard(needed)
        here += receiver == rank
        if receiver is not None and receiver != rank:
            sent[receiver] += 1
            for sender in coming:
                receive(sender)
        results.append(here + len(receiving) + len(ahead) + sent.total() - arrived.total())
    return results


class Inbox:
    """Receives messages from one rank: one at a time, in the order in which they are sent."""

    def __init__(self, group: dist.ProcessGroup, peer: int) -> None:
        """``peer``: the sender's rank in the world."""
        self.group, self.peer = group, peer
        self.arrived = 0
        """How many results of this rank have arrived at the sender."""
        self._expected: deque[Expected] = deque()
        self._new: Callable[[], Message] = list
        self._receiving: tuple[Expected, list[dist.Work], Message] | None = None
        self._arrived: dict[Action, Message] = {}

    def expect(self, results: Sequence[Expected], new: Callable[[], Message]) -> None:
        """Says which results will come.

        Args:
            new: makes the tensors of one message.
        """
        assert not self._expected and self._receiving is None and not self._arrived
        self._expected, self._new, self.arrived = deque(results), new, 0

    def receive(self, sent: int) -> None:
        """Starts to receive the next result, unless one is being received, or the next one waits for this rank.

        Args:
            sent: how many results this rank has sent.
        """
        if self._receiving is None and self._expected and self._expected[0].sends_before <= sent:
            message = self._new()
            works = _started(dist.irecv(tensor, self.peer, self.group) for tensor in message)
            self._receiving = self._expected.popleft(), works, message

    def take(self, result_of: Action, sent: int) -> Message:
        """Waits for the result of an action, and starts to receive the next one."""
        while result_of not in self._arrived:
            assert self._receiving is not None
            result, works, message = self._receiving
            _wait(works)
            self._arrived[result.result_of], self._receiving, self.arrived = message, None, result.arrived
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
            dtype: dtype of the residual stream.
        """
        self.device, self.dtype, self.rank_of = device, dtype, ranks_of_stages
        self.first = pipelines[0]
        """The ranks of the first pipeline, by their numbers in the world."""
        self.ranks = next(ranks for ranks in pipelines if dist.get_rank() in ranks)
        """The same of this pipeline."""
        self.rank, self.size = self.ranks.index(dist.get_rank()), len(self.ranks)
        self.spans = Spans(device)
        self._out: dict[int, Outbox] = {}
        self._in: dict[int, Inbox] = {}
        self._here: dict[Action, Message] = {}
        self._sent = 0
        """How many results of the current plan have been sent to other ranks."""
        for links in rounds(ranks_of_stages):
            both_ways = [groups.get(pairs(pipelines, links), way) for way in (DOWN, UP)]
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
        return Plan.of(self.rank, orders, self.rank_of)

    def expect(self, plan: Plan, shape: Sequence[int], pooled: int = 0) -> None:
        """Prepares to receive what comes from the other ranks.

        Args:
            shape: the shape of the residual stream.
            pooled: number of experts, if messages have ``HandedOn.pooled`` too; otherwise 0.
        """

        def new() -> list[Tensor]:
            hidden = torch.empty(*shape, dtype=self.dtype, device=self.device)
            return [hidden, torch.empty(2, pooled, device=self.device)] if pooled else [hidden]

        self._sent = 0
        for sender, inbox in self._in.items():
            inbox.expect(plan.expected[sender], new)
            inbox.receive(self._sent)

    def send(self, result_of: Action, message: Message) -> None:
        """Starts to send the result of an action to the rank that needs it."""
        receiver = _receiver(result_of, self.rank_of)
        if receiver == self.rank:
            self._here[result_of] = [tensor.detach() for tensor in message]
        elif receiver is not None:
            with self.spans(SEND, result_of):
                self._out[receiver].send(message)
                self._sent += 1
                for inbox in self._in.values():
                    inbox.receive(self._sent)

    def take(self, result_of: Action) -> Message:
        """Waits for the result of an action of another stage."""
        sender = self.rank_of[result_of.stage]
        if sender == self.rank:
            return self._here.pop(result_of)
        with self.spans(WAIT, result_of):
            tensor = self._in[sender].take(result_of, self._sent)
            self._out[sender].arrived(self._in[sender].arrived)
        return tensor

    def wait(self) -> None:
        """Waits until everything has been sent."""
        for outbox in self._out.values():
            outbox.wait()
