"""What the console says of steps and evaluations without any token to predict."""

import io
import math

import pytest
from rich.console import Console as Terminal

from internevo.observe.console import Console
from internevo.observe.record import StepRecord, ValidRecord


@pytest.fixture
def console() -> Console:
    return Console(1, 10, 1, Terminal(file=io.StringIO(), soft_wrap=True))


def said(console: Console) -> str:
    assert isinstance(console.terminal.file, io.StringIO)
    return console.terminal.file.getvalue()


@pytest.mark.parametrize(
    ("loss", "skipped", "shown", "hidden"),
    [
        (2.5, False, ["loss 2.5000"], ["SKIPPED", "NO LOSS"]),
        (math.nan, False, ["loss none", "NO LOSS (no token to predict)"], ["SKIPPED", "nan"]),
        (math.inf, True, ["loss inf", "SKIPPED"], ["NO LOSS"]),
    ],
)
def test_the_line_of_a_step(console: Console, loss: float, skipped: bool, shown: list[str], hidden: list[str]) -> None:
    console.step(
        StepRecord(
            step=1, loss=loss, grad_norm=0.0, lr=0.1, tokens=1, consumed_tokens=1, tgs=1.0, tflops=1.0, mfu=None, step_time=1.0,
            data_time=0.0, memory_peak=1, memory_peak_max=1, skipped=skipped, time=1.0,
        )
    )  # fmt: skip
    assert all(text in said(console) for text in shown) and not any(text in said(console) for text in hidden)


def test_an_evaluation_without_tokens_to_predict_has_no_perplexity(console: Console) -> None:
    console.valid(ValidRecord(4, math.nan, math.nan, 1.0))
    assert "warning: step 4: no validation loss, because the validation data has no token to predict" in said(console)
    assert "perplexity" not in said(console)
