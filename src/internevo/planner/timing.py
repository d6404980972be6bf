"""The time of a pipeline's schedule: its order, played out event by event, with the times of its passes.

``Played`` does what ``orders.play`` does. It keeps who waits for whom, so that an order that has been played once is played
again with other times in a fraction of a millisecond. Of many micro-batches only the first are played: from some point on, each
more takes the time of the slowest rank.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from ..parallel.orders import in_turn, orders, rank_of


class Hops(NamedTuple):
    """Times of messages: from the end of a pass until another rank can use its result."""

    inside: float = 0.0
    """Seconds between ranks in one node."""
    across: float = 0.0
    """Seconds between ranks in different nodes."""
    together: int = 1
    """Number of neighbouring pipeline ranks in one node."""


class Played(NamedTuple):
    """The actions of all ranks, in an order in which they can run."""

    ranks: tuple[int, ...]
    kinds: tuple[int, ...]
    """Its place in the list of times: 3 * stage, + 1 for a backward pass, + 2 for gradients of weights."""
    needs: tuple[int, ...]
    """The number of the action that each needs; -1: none."""
    sent: tuple[int, ...]
    """Where that is: 0 on the same rank, 1 on another one of the node, 2 in another node."""

    def seconds(self, times: list[float], hops: Hops, pipeline: int) -> float:
        """Returns the time from the first start to the last end."""
        messages = (0.0, hops.inside, hops.across)
        ends, free = [0.0] * (len(self.ranks) + 1), [0.0] * pipeline  # ends[-1] stays 0: needed by none
        actions = zip(self.ranks, self.kinds, self.needs, self.sent, strict=True)
        for number, (rank, kind, needed, sent) in enumerate(actions):
            start, arrival = free[rank], ends[needed] + messages[sent]
            free[rank] = ends[number] = (start if start > arrival else arrival) + times[kind]
        return max(free)


@lru_cache(maxsize=1024)
def compiled(mode: str, pipeline: int, chunks: int, micro_batches: int, together: int) -> Played:
    """Returns an order, ready to be played. (``together``: as in ``Hops``.)"""
    numbers: dict[object, int] = {}
    ranks, kinds, needs, sent = list[int](), list[int](), list[int](), list[int]()
    for rank, action, needed in in_turn(orders(mode, pipeline, chunks, micro_batches)):
        numbers[action] = len(ranks)
        ranks.append(rank)
        kinds.append(3 * action.stage + "FBW".index(action.kind))
        needs.append(-1 if needed is None else numbers[needed])
        other = rank if needed is None else rank_of(needed.stage, pipeline, mode)
        sent.append(0 if other == rank else 1 if other // together == rank // together else 2)
    return Played(tuple(ranks), tuple(kinds), tuple(needs), tuple(sent))


def seconds(mode: str, pipeline: int, chunks: int, micro_batches: int, times: list[float], hops: Hops) -> float:
    """Returns the time of all passes of a step.

    Args:
        times: for each stage, the times of its forward pass, its backward pass, and the gradients of weights (0, if they are a
            part of the backward pass).
    """
    if pipeline == 1:
        return micro_batches * sum(times)
    busy = [0.0] * pipeline
    for stage in range(pipeline * chunks):
        busy[rank_of(stage, pipeline, mode)] += sum(times[3 * stage : 3 * stage + 3])
    first = min(micro_batches, 2 * pipeline + micro_batches % pipeline)
    played = compiled(mode, pipeline, chunks, first, hops.together).seconds(times, hops, pipeline)
    return played + (micro_batches - first) * max(busy)
