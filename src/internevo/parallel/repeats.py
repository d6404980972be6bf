"""Which passes of a step are the same: in a step of many micro-batches, all but the first and the last ones repeat.

So what a rank does in such a step follows from a step of fewer micro-batches, in which it comes into the same situations.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from .kept import facts
from .messages import Plan, kept
from .orders import BACKWARD, FORWARD, WEIGHTS, Action, orders

LEAST = 3
"""The first micro-batch, the last one, and one between them."""


class Situation(NamedTuple):
    """A pass, and what its rank keeps before and after it. Passes in the same situation do the same with the same memory."""

    kind: str
    stage: int
    place: int
    """0: the first micro-batch, 1: one between, 2: the last one."""
    stages: tuple[tuple[int, int, tuple[bool, ...]], ...]
    """For each stage of the rank: passes that wait for their backward pass, those that wait for their gradients of weights, and
    how far its gradients are (empty: they are complete)."""
    messages: tuple[int, int]
    """Messages that are kept before and after the pass."""


def situations(mode: str, ranks: int, chunks: int, micro_batches: int, rank: int, on: Sequence[int]) -> dict[Action, Situation]:
    """Returns the passes of a rank in a step, in their order, with their situations.

    Args:
        mode: the schedule, as for ``orders``, as are the next arguments.
        rank: the place of the rank in its pipeline.
        on: the pipeline rank of each stage.
    """
    plan = Plan.of(rank, orders(mode, ranks, chunks, micro_batches), on)
    messages, last = kept(plan, rank, on), BACKWARD if mode == "1F1B" else WEIGHTS
    passes, found = {action.stage: "" for action in plan.order}, dict[Action, Situation]()
    for action, numbers in zip(plan.order, pairwise([0, *messages]), strict=True):
        kind, stage, number = action
        passes[stage] += kind
        place = 0 if number == 0 else 2 if number == micro_batches - 1 else 1
        stages = tuple(_stage(done, last, micro_batches) for done in passes.values())
        found[action] = Situation(kind, stage, place, stages, numbers)
    return found


def _stage(passes: str, last: str, micro_batches: int) -> tuple[int, int, tuple[bool, ...]]:
    forwards, backwards, weights = (passes.count(kind) for kind in (FORWARD, BACKWARD, last))
    gradients = () if weights == micro_batches else facts(passes, last, micro_batches)
    return forwards - backwards, backwards - weights, gradients


def shortened(
    mode: str, ranks: int, chunks: int, micro_batches: int, rank: int, on: Sequence[int]
) -> tuple[int, dict[Action, Action]]:
    """Finds a step of fewer micro-batches in which a rank comes into the same situations. Arguments as for ``situations``.

    Returns:
        The number of its micro-batches, and for each pass of the whole step one of the shorter step in the same situation.
    """
    whole = situations(mode, ranks, chunks, micro_batches, rank, on)
    needed = set(whole.values())
    candidates = {*range(LEAST, LEAST + ranks + 1), *range(micro_batches % ranks, micro_batches, ranks)}
    for count in sorted(n for n in candidates if LEAST <= n < micro_batches):
        examples = {situation: action for action, situation in situations(mode, ranks, chunks, count, rank, on).items()}
        if needed == examples.keys():
            return count, {action: examples[situation] for action, situation in whole.items()}
    return micro_batches, {action: action for action in whole}
