"""The learning rate and beta2 of every batch, compared with schedulers of PyTorch and transformers, and with closed forms."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler
from transformers import optimization

from internevo.config import validate
from internevo.config.training import Adam, Beta2Scheduler, LrScheduler
from internevo.train.lr_schedule import beta2, describe, learning_rate
from tests.conftest import tiny

rates = st.floats(1e-6, 1.0)
schedules = st.builds(
    LrScheduler,
    total_steps=st.integers(1, 300),
    init_steps=st.integers(0, 20),
    warmup_ratio=st.floats(0, 0.5),
    eta_min=st.floats(0, 1e-2),
)
KINDS = ("cosine", "linear", "constant", "wsd")


@st.composite
def any_kind(draw: st.DrawFn, kinds: tuple[str, ...] = KINDS) -> LrScheduler:
    """A schedule that the checks of configs let pass, with all lengths in steps."""
    total = draw(st.integers(1, 60))
    first = draw(st.integers(0, total))
    warmup = draw(st.integers(0, total - first))
    return LrScheduler.model_validate(
        {
            "kind": draw(st.sampled_from(kinds)),
            "total_steps": total,
            "init_steps": first,
            "warmup_steps": warmup,
            "decay_steps": draw(st.integers(0, total - first - warmup)),
            "decay_type": draw(st.sampled_from(("linear", "1-sqrt", "cosine"))),
            "eta_min": draw(st.floats(0, 1e-2)),
        }
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


def of_transformers(schedule: LrScheduler, optimizer: torch.optim.Optimizer) -> LRScheduler:
    """The scheduler of transformers after the steps with learning rate 0, to 0. Its warm-up begins a step earlier, with 0."""
    total = total_of(schedule)
    warmup, decay, steps = schedule.warmup(total), schedule.decay(total), total - schedule.init_steps
    if schedule.kind == "constant":
        return optimization.get_constant_schedule_with_warmup(optimizer, warmup)
    if schedule.kind == "linear":
        return optimization.get_linear_schedule_with_warmup(optimizer, warmup, steps)
    if schedule.kind == "cosine":
        return optimization.get_cosine_schedule_with_warmup(optimizer, warmup, steps)
    return optimization.get_wsd_schedule(
        optimizer, warmup, decay, num_stable_steps=steps - warmup - decay, decay_type=schedule.decay_type
    )


@given(schedule=any_kind(), peak=rates)
def test_every_kind_is_that_of_transformers_at_every_step(schedule: LrScheduler, peak: float) -> None:
    total, first = total_of(schedule), schedule.init_steps
    warmup = schedule.warmup(total)
    wanted = steps_of(of_transformers(schedule, torch.optim.SGD([torch.zeros(1)], lr=peak)), total - first)
    rising = [peak * step / warmup for step in range(1, warmup + 1)]
    assert wanted[1:warmup] == pytest.approx(rising[:-1])
    to_0 = rates_of(schedule.model_copy(update={"eta_min": 0.0}), peak, total)
    assert to_0 == pytest.approx([0.0] * first + rising + wanted[warmup:], rel=1e-6, abs=1e-12)
    falls = schedule.kind != "constant"  # from the end of the warm-up, eta_min is what 0 was
    shifted = [schedule.eta_min + (peak - schedule.eta_min) * rate / peak if falls else rate for rate in to_0[first + warmup :]]
    assert rates_of(schedule, peak, total)[first + warmup :] == pytest.approx(shifted, rel=1e-6, abs=1e-12)


@given(schedule=any_kind(("wsd", "constant")), peak=rates, more=st.integers(0, 100), ratio=st.floats(0, 1))
def test_a_longer_wsd_changes_nothing_before_the_decay(schedule: LrScheduler, peak: float, more: int, ratio: float) -> None:
    """However long the decay of the longer one is said to be: a run may go on, and say only then when its decay begins."""
    total = total_of(schedule)
    same_decay, other_decay = (
        {"total_steps": total + more},
        {"total_steps": total + more, "decay_steps": None, "decay_ratio": ratio},
    )
    for change in (same_decay, other_decay):
        longer = schedule.model_copy(update=change)
        begins = min(s.total_steps - s.decay(s.total_steps) for s in (schedule, longer) if s.total_steps)
        assert rates_of(longer, peak, begins) == rates_of(schedule, peak, begins)


@given(schedule=any_kind(("wsd",)), peak=rates)
def test_wsd_stays_at_the_peak_until_the_decay_and_then_falls_to_eta_min(schedule: LrScheduler, peak: float) -> None:
    total = total_of(schedule)
    begins = total - schedule.decay(total)
    found = rates_of(schedule, peak, total + 3)
    stable = found[schedule.init_steps + schedule.warmup(total) : begins]
    assert stable == pytest.approx([peak] * len(stable), rel=1e-12)
    towards = math.copysign(1, schedule.eta_min - peak)
    assert all((b - a) * towards >= -1e-15 for a, b in itertools.pairwise(found[begins:total]))
    if begins < total:
        assert found[begins] == pytest.approx(peak) and found[total:] == pytest.approx([schedule.eta_min] * 3)


@given(ratio=st.floats(0, 1), total=st.integers(1, 10**9))
def test_lengths_are_shares_of_all_steps_unless_they_are_given_in_steps(ratio: float, total: int) -> None:
    shares = LrScheduler(kind="wsd", warmup_ratio=ratio, decay_ratio=ratio)
    assert shares.warmup(total) == shares.decay(total) == int(total * ratio)
    steps = shares.model_copy(update={"warmup_steps": 3, "decay_steps": 4})
    assert (steps.warmup(total), steps.decay(total)) == (3, 4)
    assert steps.model_copy(update={"kind": "cosine"}).decay(total) == 0


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, "0.01, then cosine to 0 at step 20"),
        (
            {"kind": "linear", "warmup_ratio": 0.05, "eta_min": 1e-3},
            "1 step of warm-up to 0.01, then linear to 0.001 at step 20",
        ),
        ({"kind": "constant", "init_steps": 2}, "0 for 2 steps, 0.01, then constant"),
        (
            {"kind": "wsd", "warmup_steps": 3, "decay_type": "1-sqrt", "total_steps": 2000},
            "3 steps of warm-up to 0.01, then constant, 1-sqrt to 0 in the last 200 of 2,000 steps",
        ),
        ({"kind": "wsd", "total_steps": 9}, "0.01, then constant"),  # a tenth of 9 steps is none
    ],
)
def test_a_schedule_is_described_in_one_line(changes: dict[str, object], line: str) -> None:
    assert describe(validate(tiny(**{f"lr_scheduler__{key}": value for key, value in changes.items()}))) == line


def test_muon_is_named_with_its_learning_rate() -> None:
    said = [describe(validate(tiny(muon=muon))) for muon in ({}, {"lr": 0.05})]
    assert said[0] == "0.01, then cosine to 0 at step 20; the matrices of the layers with Muon"
    assert said[1] == said[0] + ", 0.05 in place of 0.01"


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
