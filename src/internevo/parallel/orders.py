"""The orders of pipeline schedules, as arithmetic: which forward and backward passes each rank runs, one after the other.

``p`` ranks, ``v`` model chunks on each, ``m`` micro-batches. F, B, W: time of a forward pass, of the gradient of the input, and
of the gradients of the weights, of all chunks of a rank together.

| schedule    | stages on rank r    | bubble (idle time)  | micro-batches kept by rank r | source                |
|-------------|---------------------|---------------------|------------------------------|-----------------------|
| 1F1B        | r                   | (p-1)(F+B+W)        | p - r                        | arXiv:2104.04473, 2.2 |
| interleaved | r, r + p, r + 2p... | (p-1)(F+B+W) / v    | more, see ``interleaved``    | arXiv:2104.04473, 2.2 |
| ZBH1        | r                   | (p-1)(F+B-W)        | p - r; for W, r more         | arXiv:2401.10241, 2.1 |
| ZBV         | r, 2p - 1 - r       | about (p-1) F / 2   | at most p                    | arXiv:2401.10241, 6   |

``play`` plays an order out, event by event.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

Kind = Literal["F", "B", "W"]
FORWARD: Literal["F"] = "F"
BACKWARD: Literal["B"] = "B"
WEIGHTS: Literal["W"] = "W"


class Action(NamedTuple):
    """A pass of one micro-batch through one stage."""

    kind: Kind
    """Forward; backward; the gradients of the weights, if the schedule does not compute them with the backward pass."""
    stage: int
    micro_batch: int


Order = list[Action]
"""What one rank does, in this order."""


def rank_of(stage: int, ranks: int, mode: str) -> int:
    """Returns the pipeline rank that a stage is on."""
    return 2 * ranks - 1 - stage if mode == "ZBV" and stage >= ranks else stage % ranks


def stages_on(rank: int, ranks: int, chunks: int, mode: str) -> list[int]:
    """Returns the stages of a pipeline rank, in the order in which a micro-batch goes through them."""
    return [stage for stage in range(ranks * chunks) if rank_of(stage, ranks, mode) == rank]


def orders(mode: str, ranks: int, chunks: int, micro_batches: int) -> list[Order]:
    """Returns the order of every rank.

    Args:
        mode: "1F1B", "ZBH1" or "ZBV".
        chunks: model chunks per rank: 1 with ZBH1, 2 with ZBV.
    """
    if mode == "ZBV":
        return zbv(ranks, micro_batches)
    if mode == "ZBH1":
        return [zbh1(rank, ranks, micro_batches) for rank in range(ranks)]
    if chunks == 1:
        return [one_f_one_b(rank, ranks, micro_batches) for rank in range(ranks)]
    return [interleaved(rank, ranks, chunks, micro_batches) for rank in range(ranks)]


def one_f_one_b(rank: int, ranks: int, micro_batches: int) -> Order:
    """1F1B: after ``p - r - 1`` forward passes, always one forward and one backward pass."""
    forward = [Action(FORWARD, rank, n) for n in range(micro_batches)]
    backward = [Action(BACKWARD, rank, n) for n in range(micro_batches)]
    return _alternate(forward, backward, warm_up=ranks - rank - 1)


def interleaved(rank: int, ranks: int, chunks: int, micro_batches: int) -> Order:
    """Interleaved 1F1B: groups of at least ``p`` micro-batches go through one chunk after the other.

    Before the first backward pass, rank r runs N = 2 (p - r - 1) + (v - 1) g + 1 forward passes, with g micro-batches in the
    largest group. It keeps the activations of at most N passes.
    """
    sizes = _groups(micro_batches, ranks)
    forward, backward, first = list[Action](), list[Action](), 0
    for size in sizes:
        group = range(first, first + size)
        forward += [Action(FORWARD, chunk * ranks + rank, n) for chunk in range(chunks) for n in group]
        backward += [Action(BACKWARD, chunk * ranks + rank, n) for chunk in reversed(range(chunks)) for n in group]
        first += size
    return _alternate(forward, backward, warm_up=2 * (ranks - rank - 1) + (chunks - 1) * sizes[0])


def zbh1(rank: int, ranks: int, micro_batches: int) -> Order:
    """ZB-H1: 1F1B whose gradients of weights are computed r micro-batches later than their backward pass."""
    order, done = Order(), 0
    for action in one_f_one_b(rank, ranks, micro_batches):
        order.append(action)
        if action.kind == BACKWARD and action.micro_batch >= rank:
            order.append(Action(WEIGHTS, rank, done))
            done += 1
    return order + [Action(WEIGHTS, rank, n) for n in range(done, micro_batches)]


@lru_cache(maxsize=4)
def zbv(ranks: int, micro_batches: int) -> list[Order]:
    """ZB-V: each rank has two stages, and a micro-batch goes down the ranks and up again.

    The order is found by playing it out with F = B = W: a rank that is free prefers a backward pass, and then a forward pass if
    it keeps the activations of fewer than 2p of them, each of half the layers of a rank; otherwise it computes gradients of
    weights. The later of two stages comes first.
    """
    stages = 2 * ranks
    orders, ended = [Order() for _ in range(ranks)], dict[Action, int]()
    count = Counter[tuple[Kind, int]]()  # (kind, stage) -> how many have been started
    on = [stages_on(rank, ranks, 2, "ZBV")[::-1] for rank in range(ranks)]
    for time in itertools.count():
        if all(len(order) == 6 * micro_batches for order in orders):
            return orders
        started = []
        for rank, order in enumerate(orders):
            kept = sum(count[FORWARD, stage] - count[WEIGHTS, stage] for stage in on[rank])
            kinds: tuple[Kind, ...] = (BACKWARD, FORWARD, WEIGHTS) if kept < stages else (BACKWARD, WEIGHTS)
            for kind, stage in itertools.product(kinds, on[rank]):
                action = Action(kind, stage, count[kind, stage])
                needed = needs(action, stages)
                if action.micro_batch < micro_batches and (needed is None or ended.get(needed, time + 1) <= time):
                    order.append(action)
                    started.append(action)
                    break
        for action in started:
            ended[action] = time + 1
            count[action.kind, action.stage] += 1
    raise AssertionError


def _groups(micro_batches: int, ranks: int) -> list[int]:
    """Divides micro-batches into groups of at least ``ranks``, and of nearly the same size, the largest first."""
    count = max(1, micro_batches // ranks)
    return [micro_batches // count + (n < micro_batches % count) for n in range(count)]


def _alternate(forward: Order, backward: Order, warm_up: int) -> Order:
    """Runs ``warm_up`` forward passes; then one forward and one backward pass in turn; and then the rest."""
    warm_up = min(warm_up, len(forward))
    order = forward[:warm_up]
    for f, b in zip(forward[warm_up:], backward, strict=False):
        order += [f, b]
    return order + backward[len(forward) - warm_up :]


def forwards(mode: str, ranks: int, chunks: int, micro_batches: int) -> list[Order]:
    """Returns the order of every rank for forward passes only: all micro-batches through one chunk after the other."""
    return [
        [Action(FORWARD, stage, n) for stage in stages_on(rank, ranks, chunks, mode) for n in range(micro_batches)]
        for rank in range(ranks)
    ]


def goes_to(action: Action, stages: int) -> int | None:
    """Returns the stage that needs the result of an action; None if there is none."""
    if action.kind == WEIGHTS:
        return None
    stage = action.stage + (1 if action.kind == FORWARD else -1)
    return stage if 0 <= stage < stages else None


# A schedule, played out ----------------------------------------------------------------------------------------------


def needs(action: Action, stages: int) -> Action | None:
    """Returns the action whose result an action needs; None for the first stage's forward passes."""
    kind, stage, micro_batch = action
    if kind == WEIGHTS:
        return Action(BACKWARD, stage, micro_batch)
    if kind == FORWARD:
        return Action(FORWARD, stage - 1, micro_batch) if stage else None
    return Action(BACKWARD, stage + 1, micro_batch) if stage < stages - 1 else Action(FORWARD, stage, micro_batch)


Turn = tuple[int, Action, Action | None]
"""A rank, an action, and the action that it needs."""


def in_turn(all_orders: Sequence[Order]) -> Iterator[Turn]:
    """Yields (rank, action, the action that it needs) for all actions, in an order in which they can run.

    Raises:
        ValueError: if the ranks would wait for each other without end, or an action has no predecessor.
    """
    stages, rest, ran = len(_ranks_of_stages(all_orders)), [deque(order) for order in all_orders], set[Action]()
    while any(rest):
        before = len(ran)
        for rank, actions in enumerate(rest):
            while actions and ((needed := needs(actions[0], stages)) is None or needed in ran):
                action = actions.popleft()
                ran.add(action)
                yield rank, action, needed
        if len(ran) == before:
            raise ValueError(f"the ranks wait for each other: {[actions[0] for actions in rest if actions]}")


def sends_before(all_orders: Sequence[Order], rank: int, turns: Iterable[Turn] | None = None) -> dict[Action, int]:
    """Returns action -> how many results a rank must have sent to other ranks before they can have the result of the action.

    Args:
        turns: ``in_turn(all_orders)``, if it is known.
    """
    on, sent = _ranks_of_stages(all_orders), 0
    before, latest = dict[Action, int](), [0] * len(all_orders)  # latest: that of the last action of each rank
    for number, action, needed in in_turn(all_orders) if turns is None else turns:
        if number == rank:
            receiver = goes_to(action, len(on))
            sent += receiver is not None and on[receiver] != rank
            latest[rank] = sent
        elif needed is not None:
            latest[number] = max(latest[number], before[needed])
        before[action] = latest[number]
    return before


def _ranks_of_stages(all_orders: Sequence[Order]) -> dict[int, int]:
    return {action.stage: rank for rank, order in enumerate(all_orders) for action in order}


class Timed(NamedTuple):
    """An action with the times of its start and its end."""

    action: Action
    start: float
    end: float


def play(all_orders: Sequence[Order], seconds: Callable[[Action], float], message: float = 0.0) -> list[list[Timed]]:
    """Plays the orders of all ranks out: every action starts when its rank is free and what it needs has arrived.

    Args:
        seconds: returns how long an action takes.
        message: the time from the end of an action until another rank can use its result.

    Raises:
        ValueError: if the ranks would wait for each other without end, or an action has no predecessor.
    """
    on = _ranks_of_stages(all_orders)
    played, ends = [list[Timed]() for _ in all_orders], dict[Action, float]()
    for rank, action, needed in in_turn(all_orders):
        arrival = 0.0
        if needed is not None:
            arrival = ends[needed] + (message if on[needed.stage] != rank else 0.0)
        start = max(played[rank][-1].end if played[rank] else 0.0, arrival)
        ends[action] = start + seconds(action)
        played[rank].append(Timed(action, start, ends[action]))
    return played


def bubble(played: Sequence[Sequence[Timed]]) -> float:
    """Returns the share of the time in which the ranks are idle, from the first start to the last end."""
    actions = list(itertools.chain(*played))
    length = max(timed.end for timed in actions) - min(timed.start for timed in actions)
    return 1.0 - sum(timed.end - timed.start for timed in actions) / (length * len(played))


def most_in_flight(order: Order) -> int:
    """Returns the largest number of forward passes that wait for their backward pass at the same time."""
    most = now = 0
    for action in order:
        now += {FORWARD: 1, BACKWARD: -1, WEIGHTS: 0}[action.kind]
        most = max(most, now)
    return most
