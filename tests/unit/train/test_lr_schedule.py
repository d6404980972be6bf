"""The learning rate and beta2 of every batch, compared with PyTorch's schedulers and with closed forms."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler

from internevo.config.training import Adam, Beta2Scheduler, LrScheduler
from internevo.train.lr_schedule import beta2, learning_rate

rates = st.floats(1e-6, 1.0)
schedules = st.builds(
    LrScheduler,
    total_steps=st.integers(1, 300),
    init_steps=st.integers(0, 20),
    warmup_ratio=st.floats(0, 0.5),
    eta_min=st.floats(0, 1e-2),
)


def total_of(schedule: LrScheduler) -> int:
    assert schedule.total_steps is not None
    return schedule.total_steps


def warm_up(schedule: LrScheduler) -> int:
    """Returns the number of warm-up steps."""
    return int(total_of(schedule) * schedule.warmup_ratio)


def rates_of(schedule: LrScheduler, peak: float, batches: int) -> list[float]:
    return [learning_rate(batch, 10**6, peak, schedule) for batch in range(batches)]


def steps_of(scheduler: LRScheduler, count: int) -> list[float]:
    """Returns the learning rates of ``count`` steps of one of PyTorch's schedulers."""
    found = []
    for _ in range(count):
        found.append(float(scheduler.get_last_lr()[0]))
        scheduler.optimizer.step()
        scheduler.step()
    return found


@given(schedule=schedules, peak=rates)
def test_the_learning_rate_is_pytorchs_linear_warm_up_and_then_its_cosine(schedule: LrScheduler, peak: float) -> None:
    def optimizer() -> torch.optim.Optimizer:
        return torch.optim.SGD([torch.zeros(1)], lr=peak)

    total, first = total_of(schedule), schedule.init_steps
    wanted, steps = [0.0] * first, warm_up(schedule)
    if steps == 1:
        wanted += [peak]  # LinearLR would divide by 0
    elif steps > 1:
        wanted += steps_of(LinearLR(optimizer(), start_factor=1 / steps, end_factor=1.0, total_iters=steps - 1), steps)
    left = total - len(wanted)
    if left > 0:
        wanted += steps_of(CosineAnnealingLR(optimizer(), T_max=left, eta_min=schedule.eta_min), left)
    assert rates_of(schedule, peak, total) == pytest.approx(wanted[:total], rel=1e-6, abs=1e-9)


@given(schedule=schedules, peak=rates)
def test_it_is_0_rises_to_the_peak_falls_to_eta_min_and_then_stays_constant(schedule: LrScheduler, peak: float) -> None:
    first = schedule.init_steps
    top = first + warm_up(schedule)
    end = max(total_of(schedule), top + 1)
    found = rates_of(schedule, peak, end + 5)
    assert found[:first] == [0.0] * first
    rising = found[first:top]
    assert all(a < b for a, b in itertools.pairwise(rising)) and (not rising or rising[-1] == pytest.approx(peak))
    falling = found[top:]
    assert falling[0] == pytest.approx(peak)
    towards = math.copysign(1, schedule.eta_min - peak)
    assert all((b - a) * towards >= -1e-15 for a, b in itertools.pairwise(falling))
    assert found[end:] == [schedule.eta_min] * 5


@given(schedule=schedules, peak=rates, batch=st.integers(0, 400))
def test_without_its_own_total_steps_the_schedule_ends_with_the_data(schedule: LrScheduler, peak: float, batch: int) -> None:
    unnamed = schedule.model_copy(update={"total_steps": None})
    assert learning_rate(batch, total_of(schedule), peak, unnamed) == learning_rate(batch, 10**6, peak, schedule)


def test_half_way_between_warm_up_and_end_it_is_half_way_between_peak_and_eta_min() -> None:
    schedule = LrScheduler(total_steps=110, init_steps=4, warmup_ratio=0.1, eta_min=0.2)
    # 4 steps of 0 and 11 of warm-up; the middle of the cosine is in the middle of the other 95.
    before, after = (learning_rate(batch, 1, 1.0, schedule) for batch in (62, 63))
    assert (before + after) / 2 == pytest.approx(0.6)


@given(steps=st.integers(1, 10**6), c=st.floats(0.01, 2), least=st.floats(0, 0.999))
def test_beta2_is_adafactors_but_not_less_than_its_smallest_value(steps: int, c: float, least: float) -> None:
    schedule = Beta2Scheduler(init_beta2=least, c=c)
    found = beta2(steps - 1, Adam(lr=1), schedule)
    assert found == pytest.approx(max(least, 1 - math.exp(-c * math.log(steps))), abs=1e-12)
    assert least <= found < 1
    assert found <= beta2(steps, Adam(lr=1), schedule)


@given(batch=st.integers(0, 10**6), value=st.floats(0, 0.999), c=st.floats(-2, 0))
def test_beta2_is_constant_without_a_schedule_or_without_an_exponent(batch: int, value: float, c: float) -> None:
    assert beta2(batch, Adam(lr=1, adam_beta2=value), None) == value
    assert beta2(batch, Adam(lr=1, adam_beta2=0.5), Beta2Scheduler(init_beta2=value, c=c)) == value
