"""What a rank of a pipeline keeps while a step runs: numbers of passes and messages, which follow from the schedule alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from functools import lru_cache
from operator import le
from typing import NamedTuple

from .messages import Plan, kept
from .orders import BACKWARD, FORWARD, WEIGHTS, Action, orders, rank_of, stages_on

_orders = lru_cache(maxsize=32)(orders)


class Point(NamedTuple):
    """What a rank keeps after a pass. Each tuple has a number for each of its stages."""

    forward: tuple[int, ...]
    """Forward passes whose activations a backward pass needs."""
    backward: tuple[int, ...]
    """Backward passes from which the gradients of weights will be computed."""
    passes: tuple[str, ...]
    """The kinds of the passes so far, such as "FFBFB", or of the first ones with the same weights and gradients."""
    messages: int
    after: Action
    """The pass."""


@lru_cache(maxsize=2048)
def points(schedule: str, ranks: int, chunks: int, micro_batches: int, rank: int) -> tuple[Point, ...]:
    """Returns what a rank keeps after its passes, except those after which it certainly has less than after another one. If it
    keeps the same after several of them, the last one is returned."""
    numbers = stages_on(rank, ranks, chunks, schedule)
    stages = [rank_of(stage, ranks, schedule) for stage in range(ranks * chunks)]
    planned, zero_bubble = Plan.of(rank, _orders(schedule, ranks, chunks, micro_batches), stages), schedule != "1F1B"
    forward, backward, passes = dict.fromkeys(numbers, 0), dict.fromkeys(numbers, 0), dict.fromkeys(numbers, "")
    first = dict[tuple[bool, ...], str]()
    found = dict[tuple[object, ...], Point]()
    for action, messages in zip(planned.order, kept(planned, rank, stages), strict=True):
        kind, number, _ = action
        passes[number] += kind
        forward[number] += (kind == FORWARD) - (kind == BACKWARD)
        backward[number] += ((kind == BACKWARD) - (kind == WEIGHTS)) * zero_bubble
        if kind == FORWARD or (kind == BACKWARD and zero_bubble):
            last = WEIGHTS if zero_bubble else BACKWARD
            same = tuple(first.setdefault(facts(text, last, micro_batches), text) for text in passes.values())
            point = Point(tuple(forward.values()), tuple(backward.values()), same, messages, action)
            found.pop(point[:4], None)
            found[point[:4]] = point
    return tuple(point for point in found.values() if not any(_is_less(point, other) for other in found.values()))


class Within(NamedTuple):
    """What a rank keeps while a pass runs: at the end of a forward pass, and at the beginning of any other one. Each tuple has
    a number for each of its stages, as those of ``Point``."""

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
def within(schedule: str, ranks: int, chunks: int, micro_batches: int, rank: int) -> tuple[Within, ...]:
    """Returns what a rank keeps in its passes, except in those in which it certainly has less than in another one that does the
    same. Arguments as for ``points``."""
    numbers = stages_on(rank, ranks, chunks, schedule)
    stages = [rank_of(stage, ranks, schedule) for stage in range(ranks * chunks)]
    planned, zero_bubble = Plan.of(rank, _orders(schedule, ranks, chunks, micro_batches), stages), schedule != "1F1B"
    forward, backward, passes = dict.fromkeys(numbers, 0), dict.fromkeys(numbers, 0), dict.fromkeys(numbers, "")
    last, before, first = WEIGHTS if zero_bubble else BACKWARD, 0, dict[tuple[bool, ...], str]()
    found = defaultdict[tuple[object, ...], dict[tuple[int, ...], Within]](dict)
    for (kind, number, micro_batch), messages in zip(planned.order, kept(planned, rank, stages), strict=True):
        if kind == FORWARD:
            passes[number] += kind
            forward[number] += 1
        same = tuple(first.setdefault(facts(text, last, micro_batches), text) for text in passes.values())
        completes = kind == last and micro_batch == micro_batches - 1
        most = messages if kind == FORWARD else max(before, messages)
        what, place = (kind, number, completes, same), numbers.index(number)
        amounts = *forward.values(), *backward.values(), most
        found[what][amounts] = Within(kind, place, completes, tuple(forward.values()), tuple(backward.values()), same, most)
        if kind != FORWARD:
            passes[number] += kind
            forward[number] -= kind == BACKWARD
            backward[number] += ((kind == BACKWARD) - (kind == WEIGHTS)) * zero_bubble
        before = messages
    return tuple(one for alike in found.values() for amounts, one in alike.items() if not _is_exceeded(amounts, alike))


def _is_exceeded(amounts: tuple[int, ...], others: Iterable[tuple[int, ...]]) -> bool:
    """Whether one of the others has more of something, and less of nothing."""
    return any(amounts != other and all(map(le, amounts, other)) for other in others)


def _is_less(point: Point, other: Point) -> bool:
    """Whether a rank keeps less of something, and more of nothing, with the same weights and gradients."""
    mine, theirs = ((*p.forward, *p.backward, p.messages) for p in (point, other))
    return point.passes == other.passes and mine != theirs and all(map(le, mine, theirs))


def facts(passes: str, last: str, micro_batches: int) -> tuple[bool, ...]:
    """Returns all that ``memory.weights_and_gradients`` asks about passes."""
    back = passes.replace(FORWARD, "")
    return (
        FORWARD in passes, BACKWARD in passes, last in passes, passes.count(last) == micro_batches, WEIGHTS + BACKWARD in back,
        back.endswith(WEIGHTS),
    )  # fmt: skip
