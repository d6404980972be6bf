"""The learning rate and beta2, as functions of the number of the batch. They have no state."""

from __future__ import annotations

import math
from collections.abc import Callable

from ..config import Config
from ..config.training import Adam, Beta2Scheduler, LrScheduler
from ..wording import counted

SHAPES: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: (1 + math.cos(math.pi * progress)) / 2,
    "linear": lambda progress: 1 - progress,
    "1-sqrt": lambda progress: 1 - math.sqrt(progress),
    "constant": lambda progress: 1.0,
}
"""Along what a learning rate falls: how much is left of the way from ``peak`` to ``eta_min``, from progress 0 to 1."""


def learning_rate(batch: int, total_steps: int, peak: float, schedule: LrScheduler) -> float:
    """Returns the learning rate of a batch.

    It is 0 for ``init_steps`` steps, and rises linearly to ``peak`` in the steps of the warm-up. Then, by ``kind``:

    - cosine: it follows a cosine that reaches ``eta_min`` at step ``total``
      (https://arxiv.org/abs/1608.03983, without restarts).
    - linear: it follows a straight line to there.
    - constant: it stays at ``peak``.
    - wsd: it stays at ``peak``, and in the last steps falls to ``eta_min``, which it reaches at step ``total``
      (warmup-stable-decay, https://arxiv.org/abs/2404.06395, section 4). 1-sqrt is from
      https://arxiv.org/abs/2405.18392, section 3.

    Before the decay, the rate of wsd does not depend on ``total`` if the warm-up is given in steps: a run that goes on to a
    later ``total`` is one that has had it from the beginning.

    Args:
        batch: number of the batch, from 0.
        total_steps: ``total``, if the schedule has no ``total_steps``.
        peak: the highest learning rate.
    """
    total = schedule.total_steps or total_steps
    warmup = schedule.warmup(total)
    if batch < schedule.init_steps:
        return 0.0
    if batch < schedule.init_steps + warmup:
        return peak * (batch + 1 - schedule.init_steps) / warmup
    start = total - schedule.decay(total) if schedule.kind == "wsd" else schedule.init_steps + warmup
    left = SHAPES[schedule.decay_type if schedule.kind == "wsd" else schedule.kind]
    progress = min(max(batch - start, 0) / max(total - start, 1), 1.0)
    return schedule.eta_min + (peak - schedule.eta_min) * left(progress)


def describe(config: Config) -> str:
    """Describes the learning rate of a run in one line, and what Muon updates."""
    schedule, peak = config.lr_scheduler, config.adam.lr
    total = schedule.total_steps or config.data.total_steps
    first, warmup, decay = schedule.init_steps, schedule.warmup(total), schedule.decay(total)
    parts = [f"0 for {counted(first, 'step')}"] if first else []
    parts.append(f"{counted(warmup, 'step')} of warm-up to {peak:g}" if warmup else f"{peak:g}")
    if schedule.kind in ("cosine", "linear"):
        parts.append(f"then {schedule.kind} to {schedule.eta_min:g} at step {total:,}")
    else:
        parts.append("then constant")
    if decay:
        parts.append(f"{schedule.decay_type} to {schedule.eta_min:g} in the last {decay:,} of {counted(total, 'step')}")
    if config.muon is None:
        return ", ".join(parts)
    own = "" if config.muon.lr is None else f", {config.muon.lr:g} in place of {peak:g}"
    return f"{', '.join(parts)}; the matrices of the layers with Muon{own}"


def beta2(batch: int, adam: Adam, schedule: Beta2Scheduler | None) -> float:
    """Returns Adam's beta2 of batch number ``batch``, from 0.

    With a schedule it is max(init_beta2, 1 - (batch + 1) ** -c), as in Adafactor (https://arxiv.org/abs/1804.04235, section
    7.2); if c <= 0, it is always init_beta2.
    """
    if schedule is None:
        return adam.adam_beta2
    if schedule.c <= 0:
        return schedule.init_beta2
    return max(schedule.init_beta2, 1.0 - float(batch + 1) ** -schedule.c)
