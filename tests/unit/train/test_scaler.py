"""The loss scale, compared with a written table, and with PyTorch's GradScaler where that has the same rule."""

import json
import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from internevo.config.training import Fp16Scaler, GradScaler
from internevo.train.scaler import LossScaler

OVERFLOW, CLEAN = True, False
events = st.lists(st.booleans(), max_size=60)


def scaler(hysteresis: int = 2, interval: int = 3, lowest: float | None = None, highest: float | None = None) -> LossScaler:
    fp16 = Fp16Scaler(initial_scale=64.0, min_scale=lowest, growth_interval=interval)
    return LossScaler.from_config(GradScaler(fp16=fp16, hysteresis=hysteresis, max_scale=highest), "float16")


# What happened in each step, and the scale after it. It grows after 3 clean steps; its limits are 16 and 128.
TABLE = [
    (CLEAN, 64), (CLEAN, 64), (CLEAN, 128),  # grows
    (CLEAN, 128), (CLEAN, 128), (CLEAN, 128),  # not above the upper limit
    (OVERFLOW, 128), (OVERFLOW, 64),  # shrinks at the second overflow in a row
    (OVERFLOW, 32), (OVERFLOW, 16), (OVERFLOW, 16),  # and at each one after it, but not below the lower limit
    (CLEAN, 16), (OVERFLOW, 16), (CLEAN, 16), (OVERFLOW, 16),  # never two in a row
    (CLEAN, 16), (CLEAN, 16), (OVERFLOW, 16),  # an overflow resets the count of clean steps
    (CLEAN, 16), (CLEAN, 16), (CLEAN, 32), (CLEAN, 32), (CLEAN, 32), (CLEAN, 64),
    (OVERFLOW, 64), (OVERFLOW, 32),
]  # fmt: skip


def test_the_scale_follows_the_table() -> None:
    mine = scaler(lowest=16.0, highest=128.0)
    found = []
    for overflow, _ in TABLE:
        mine.update(overflow)
        found.append((overflow, mine.scale))
    assert found == TABLE


@given(events=events, hysteresis=st.sampled_from([0, 1]), interval=st.integers(1, 5))
def test_without_hysteresis_and_limits_the_scale_is_pytorchs(events: list[bool], hysteresis: int, interval: int) -> None:
    mine = scaler(hysteresis, interval)
    theirs = torch.amp.GradScaler("cpu", init_scale=64.0, growth_factor=2.0, backoff_factor=0.5, growth_interval=interval)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    for overflow in events:
        theirs.scale(torch.zeros(1))
        parameter.grad = torch.tensor([math.inf if overflow else 1.0])
        theirs.step(optimizer)
        theirs.update()
        mine.update(overflow)
        assert mine.scale == theirs.get_scale()


@given(events=events, hysteresis=st.integers(0, 4), interval=st.integers(1, 5), low=st.integers(0, 6), high=st.integers(6, 9))
def test_the_scale_stays_within_its_limits(events: list[bool], hysteresis: int, interval: int, low: int, high: int) -> None:
    mine = scaler(hysteresis, interval, 2.0**low, 2.0**high)
    for overflow in events:
        mine.update(overflow)
        assert 2.0**low <= mine.scale <= 2.0**high


@example(before=[OVERFLOW] * 8, after=[], hysteresis=0, interval=1)
@given(before=events, after=events, hysteresis=st.integers(0, 3), interval=st.integers(1, 5))
def test_a_checkpoint_has_the_whole_state(before: list[bool], after: list[bool], hysteresis: int, interval: int) -> None:
    """Also a scale of 1, which models of other dtypes always have."""
    whole, loaded = scaler(hysteresis, interval, lowest=1.0), scaler(hysteresis, interval, lowest=1.0)
    for overflow in before:
        whole.update(overflow)
    loaded.load(json.loads(json.dumps(whole.state())))
    for overflow in after:
        whole.update(overflow)
        loaded.update(overflow)
    assert loaded == whole


@pytest.mark.parametrize("dtype", ["float32", "tf32", "bfloat16"])
def test_other_dtypes_always_have_a_scale_of_1(dtype: str) -> None:
    other, half = LossScaler.from_config(GradScaler(), dtype), scaler()
    for overflow in (OVERFLOW, OVERFLOW, *[CLEAN] * 2000):
        other.update(overflow)
    assert other.scale == 1.0
    half.load(other.state())
    assert half == scaler()  # fp16 starts with its initial scale
    half.update(OVERFLOW)
    half.update(OVERFLOW)
    other.load(half.state())
    assert other.scale == 1.0


def test_older_checkpoints_without_the_dtype_can_be_read() -> None:
    mine, before = scaler(), scaler()
    mine.load({"scale": 8.0, "clean": 2, "overflows": 1})
    assert (mine.scale, mine.clean, mine.overflows) == (8.0, 2, 1)
    before.load({"scale": 1.0, "clean": 0, "overflows": 0})
    assert before == scaler()


@pytest.mark.parametrize("lowest", [None, 0.25, 1.0, 16.0])
def test_an_overflow_has_another_reason_when_the_scale_cannot_shrink_or_is_1(lowest: float | None) -> None:
    mine = scaler(hysteresis=1, lowest=lowest)
    while mine.scale > max(1.0, lowest or 0.0):
        assert not mine.smallest
        mine.update(OVERFLOW)
    assert mine.smallest
    assert LossScaler.from_config(GradScaler(), "bfloat16").smallest
