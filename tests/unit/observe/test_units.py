"""Numbers with units."""

import pytest

from internevo.observe.units import amount, clock, duration, flops, size


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (950, "950"), (999, "999"), (1000, "1.00k"), (12_345, "12.3k"), (999_499, "999k"), (999_600, "1.00M"),
     (1_638_400, "1.64M"), (15e12, "15.0T"), (2e16, "20,000T")],
)  # fmt: skip
def test_amounts_have_three_digits(number: float, text: str) -> None:
    assert amount(number) == text


@pytest.mark.parametrize(
    ("tflops", "text"),
    [(0, "0 MFLOPS"), (1.17e-5, "11.7 MFLOPS"), (0.00516, "5.16 GFLOPS"), (0.5, "0.5 TFLOPS"), (412.3, "412 TFLOPS")],
)
def test_speeds(tflops: float, text: str) -> None:
    assert flops(tflops) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0 s"), (3.21, "3.2 s"), (59.97, "1 min 0 s"), (200, "3 min 20 s"), (3599.7, "1 h 0 min"), (7500, "2 h 5 min"),
     (86_400 * 3 + 3600 * 4.5, "3 d 4 h")],
)  # fmt: skip
def test_durations_have_two_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_clocks_and_sizes() -> None:
    assert [clock(200.4), clock(2 * 86_400 + 5)] == ["0:03:20", "2 days, 0:00:05"]
    assert [size(5), size(18_200_000), size(2e12)] == ["5 B", "18.2 MB", "2,000 GB"]
