"""Learning rate and beta2 as functions of the batch number. They have no state."""

from __future__ import annotations

import math

from ..config.training import Adam, Beta2Scheduler, LrScheduler


def learning_rate(batch: int, total_steps: int, peak: float, schedule: LrScheduler) -> float:
    """Learning rate of batch number ``batch`` (from 0).

    0 for ``init_steps``; then linear to ``peak`` over ``int(total * warmup_ratio)`` steps; then a cosine that would reach
    ``eta_min`` at ``total`` (https://arxiv.org/abs/1608.03983, without restarts).
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
    """Adam's beta2 of batch number ``batch`` (from 0): max(init_beta2, 1 - iteration ** -c), constant when c <= 0.

    The growing form is Adafactor's (https://arxiv.org/abs/1804.04235, section 7.2).
    """
    if schedule is None:
        return adam.adam_beta2
    if schedule.c <= 0:
        return schedule.init_beta2
    return max(schedule.init_beta2, 1.0 - float(batch + 1) ** -schedule.c)
