"""What a rank of a pipeline keeps while a step runs: numbers of passes and messages, which follow from the schedule alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import lru_cache
from operator import le
from typing import NamedTuple

from .messages import Plan, kept
from .orders import BACKWARD, FORWARD, WEIGHTS, Action, Turn, in_turn, orders, rank_of, stages_on

_orders = lru_cache(maxsize=32)(orders)


@lru_cache(maxsize=1)
def _turns(schedule: str, ranks: int, chunks: int, micro_batches: int) -> tuple[Turn, ...]:
    """``in_turn`` of all orders, which takes longer than the rest: kept while one rank after the other is asked for."""
    return tuple(in_turn(_orders(schedule, ranks, chunks, micro_batches)))


class Kept(NamedTuple):
    """What a rank keeps between two passes. Each tuple has a number for each of its stages."""

    forward: tuple[int, ...]
    """Forward passes whose activations a backward pass needs."""
    backward: tuple[int, ...]
    """Backward passes from which the gradients of weights will be computed."""
    passes: tuple[str, ...]
    """The kinds of the passes so far, such as "FFBFB", or of the first ones with the same weights and gradients."""
    messages: int


class Point(NamedTuple):
    """What a rank keeps after a pass: as ``Kept``."""

    forward: tuple[int, ...]
    backward: tuple[int, ...]
    passes: tuple[str, ...]
    messages: int
    after: Action
    """The pass."""


class Within(NamedTuple):
    """What a rank keeps while a pass runs: at the end of a forward pass, and at the beginning of any other one. As ``Kept``."""

    kind: str
    stage: int
    """The place of the stage of the pass among those of the rank."""
    last: bool
    """Whether its end completes the gradients of its stage."""
    forward: tuple[int, ...]
    backward: tuple[int, ...]
    passes: tuple[str, ...]
    messages: int


@lru_cache(maxsize=2048)
def points(schedule: str, ranks: int, chunks: int, micro_batches: int, rank: int) -> tuple[Point, ...]:
    """Returns what a rank keeps after its passes, except those after which it certainly has less than after another one. If it
    keeps the same after several of them, the last one is returned."""
    found = dict[Kept, Point]()
    for action, _, after in _around(schedule, ranks, chunks, micro_batches, rank):
        if action.kind == FORWARD or (action.kind == BACKWARD and schedule != "1F1B"):
            found.pop(after, None)
            found[after] = Point(*after, action)
    return tuple(point for point in found.values() if not any(_is_less(point, other) for other in found.values()))


@lru_cache(maxsize=2048)
def within(schedule: str, ranks: int, chunks: int, micro_batches: int, rank: int) -> tuple[Within, ...]:
    """Returns what a rank keeps in its passes, except in those in which it certainly has less than in another one that does the
    same. Arguments as for ``points``."""
    places = {stage: place for place, stage in enumerate(stages_on(rank, ranks, chunks, schedule))}
    found = defaultdict[tuple[object, ...], dict[tuple[int, ...], Within]](dict)
    for (kind, number, micro_batch), before, after in _around(schedule, ranks, chunks, micro_batches, rank):
        has = after if kind == FORWARD else before._replace(messages=max(before.messages, after.messages))
        completes = kind == _last(schedule) and micro_batch == micro_batches - 1
        alike = found[kind, number, completes, has.passes]
        alike[*has.forward, *has.backward, has.messages] = Within(kind, places[number], completes, *has)
    return tuple(one for alike in found.values() for amounts, one in alike.items() if not _is_exceeded(amounts, alike))


def _around(schedule: str, ranks: int, chunks: int, micro_batches: int, rank: int) -> Iterator[tuple[Action, Kept, Kept]]:
    """Yields each pass of a rank, with what the rank keeps before and after it."""
    numbers = stages_on(rank, ranks, chunks, schedule)
    stages = [rank_of(stage, ranks, schedule) for stage in range(ranks * chunks)]
    all_ranks = schedule, ranks, chunks, micro_batches
    planned = Plan.of(rank, _orders(*all_ranks), stages, _turns(*all_ranks))
    forward, backward, passes = dict.fromkeys(numbers, 0), dict.fromkeys(numbers, 0), dict.fromkeys(numbers, "")
    first = dict[tuple[bool, ...], str]()

    def now(messages: int) -> Kept:
        same = (first.setdefault(facts(text, _last(schedule), micro_batches), text) for text in passes.values())
        return Kept(tuple(forward.values()), tuple(backward.values()), tuple(same), messages)

    before = now(0)
    for action, messages in zip(planned.order, kept(planned, rank, stages), strict=True):
        kind, number, _ = action
        passes[number] += kind
        forward[number] += (kind == FORWARD) - (kind == BACKWARD)
        backward[number] += ((kind == BACKWARD) - (kind == WEIGHTS)) * (schedule != "1F1B")
        after = now(messages)
        yield action, before, after
        before = after


def _last(schedule: str) -> str:
    """Returns the kind of pass that completes the gradients of a stage."""
    return BACKWARD if schedule == "1F1B" else WEIGHTS


def _is_exceeded(amounts: tuple[int, ...], others: Iterable[tuple[int, ...]]) -> bool:
    """Whether one of the others has more of something, and less of nothing."""
    return any(amounts != other and all(map(le, amounts, other)) for other in others)


def _is_less(point: Point, other: Point) -> bool:
    """Whether a rank keeps less of something, and more of nothing, with the same weights and gradients."""
    mine, theirs = ((*p.forward, *p.backward, p.messages) for p in (point, other))
    return point.passes == other.passes and mine != theirs and all(map(le, mine, theirs))


def facts(passes: str, last: str, micro_batches: int) -> tuple[bool, ...]:
    """Returns all that ``memory.weights_and_gradients`` asks about passes."""
    return (
        FORWARD in passes, BACKWARD in passes, last in passes, passes.count(last) == micro_batches,
        passes.count(FORWARD) > passes.count(BACKWARD),
    )  # fmt: skip
