"""The learning rate and beta2, as functions of the number of the batch. They have no state."""

from __future__ import annotations

import math

from ..config.training import Adam, Beta2Scheduler, LrScheduler


def learning_rate(batch: int, total_steps: int, peak: float, schedule: LrScheduler) -> float:
    """Returns the learning rate of a batch.

    It is 0 for ``init_steps`` steps. Then it rises linearly to ``peak`` in ``int(total * warmup_ratio)`` steps. Then it follows
    a cosine that reaches ``eta_min`` at step ``total`` (https://arxiv.org/abs/1608.03983, without restarts).

    Args:
        batch: number of the batch, from 0.
        total_steps: ``total``, if the schedule has no ``total_steps``.
        peak: the highest learning rate.
    """
    total = schedule.total_steps or total_steps
    warmup = int(total * schedule.warmup_ratio)
    if batch < schedule.init_steps:
        return 0.0
    if batch < schedule.init_steps + warmup:
        return peak * (batch + 1 - schedule.init_steps) / warmup
    start = schedule.init_steps + warmup
    progress = min((batch - start) / max(total - start, 1), 1.0)
    return schedule.eta_min + (peak - schedule.eta_min) * (1 + math.cos(math.pi * progress)) / 2


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
