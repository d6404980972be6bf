"""Messages between pipeline ranks: point-to-point, of known shape, and in each direction over a process group of its own.

On a GPU the messages of a group run one after the other. If both directions shared a group, two ranks could each wait for the
other one to receive. A channel carries its messages in the order in which the sender sends them, which both sides know.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import chain, pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from .orders import Action, Order, goes_to
from .views import Groups


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


class Inbox:
    """Receives tensors from one rank. The next one is always being received already when it is asked for."""

    def __init__(self, group: dist.ProcessGroup, peer: int) -> None:
        """``peer``: the sender's rank in the world."""
        self.group, self.peer = group, peer
        self._expected: deque[Action] = deque()
        self._buffer = torch.empty(0)
        self._receiving: tuple[Action, dist.Work, Tensor] | None = None
        self._arrived: dict[Action, Tensor] = {}

    def expect(self, results_of: Sequence[Action], like: Tensor) -> None:
        """Says which results will come, in the order in which they are sent, and starts to receive the first.

        Args:
            like: a tensor of the same shape, dtype and device.
        """
        assert not self._expected and self._receiving is None and not self._arrived
        self._expected, self._buffer = deque(results_of), like
        self._receive_next()

    def take(self, result_of: Action) -> Tensor:
        """Waits for the result of an action."""
        while result_of not in self._arrived:
            assert self._receiving is not None
            action, work, tensor = self._receiving
            work.wait()
            self._arrived[action] = tensor
            self._receive_next()
        return self._arrived.pop(result_of)

    def _receive_next(self) -> None:
        self._receiving = None
        if self._expected:
            tensor = torch.empty_like(self._buffer)
            work = dist.irecv(tensor, self.peer, self.group)
            assert work is not None
            self._receiving = self._expected.popleft(), work, tensor


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
        self.group, self.device, self.dtype = groups.get(pipelines), device, dtype
        self.rank_of, self.stages = ranks_of_stages, len(ranks_of_stages)
        self.ranks = next(ranks for ranks in pipelines if dist.get_rank() in ranks)
        """The ranks of this pipeline, by their numbers in the world."""
        self.rank, self.size = self.ranks.index(dist.get_rank()), len(self.ranks)
        self._out: dict[int, Outbox] = {}
        self._in: dict[int, Inbox] = {}
        self._here: dict[Action, Tensor] = {}
        for number, links in enumerate(rounds(ranks_of_stages)):
            pairs = [[ranks[n] for n in pair] for ranks in pipelines for pair in links]
            alone = [[rank] for rank in sorted({*chain(*pipelines)} - {*chain(*pairs)})]
            both_ways = [groups.get(pairs + alone, f"pipeline, round {number}, {way}") for way in ("down", "up")]
            for a, b in links:
                if self.rank in (a, b):
                    out, back = both_ways if self.rank == a else reversed(both_ways)
                    peer = b if self.rank == a else a
                    self._out[peer], self._in[peer] = Outbox(out, self.ranks[peer]), Inbox(back, self.ranks[peer])

    def expect(self, orders: Sequence[Order], shape: Sequence[int]) -> None:
        """Prepares to receive what the ranks send to this one when they follow their orders."""
        like = torch.empty(*shape, dtype=self.dtype, device=self.device)
        for sender, inbox in self._in.items():
            inbox.expect([action for action in orders[sender] if self._receiver(action) == self.rank], like)

    def send(self, result_of: Action, tensor: Tensor) -> None:
        """Starts to send the result of an action to the rank that needs it."""
        receiver = self._receiver(result_of)
        if receiver == self.rank:
            self._here[result_of] = tensor.detach()
        elif receiver is not None:
            self._out[receiver].send(tensor)

    def take(self, result_of: Action) -> Tensor:
        """Waits for the result of an action of another stage."""
        sender = self.rank_of[result_of.stage]
        return self._here.pop(result_of) if sender == self.rank else self._in[sender].take(result_of)

    def wait(self) -> None:
        """Waits until everything has been sent."""
        for outbox in self._out.values():
            outbox.wait()

    def _receiver(self, action: Action) -> int | None:
        stage = goes_to(action, self.stages)
        return None if stage is None else self.rank_of[stage]
