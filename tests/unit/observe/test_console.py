"""What the console says: of each step a line that fits the terminal, or a whole one in a file; what is being done; samples."""

import io
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console as Terminal

from internevo.observe.console import Console
from internevo.observe.record import StepRecord, ValidRecord

STEP = StepRecord(
    step=1, loss=2.5, grad_norm=0.0, lr=0.1, tokens=1, consumed_tokens=1, tgs=1.0, tflops=1.0, mfu=None, step_time=1.0,
    data_time=0.0, memory_peak=1, memory_peak_max=1, skipped=False, time=1.0,
)  # fmt: skip
MOE = {"max_load": 1.5, "dropped": 0.25}
numbers = st.floats(0, 1e15)
steps = st.builds(
    StepRecord, step=st.integers(1, 10**7), loss=st.floats(), grad_norm=st.floats(0), lr=st.floats(0, 1), tokens=st.just(1),
    consumed_tokens=st.integers(0, 10**16), tgs=numbers, tflops=numbers, mfu=st.none() | st.floats(0, 1),
    step_time=st.floats(0, 1e5), data_time=st.just(0.0), memory_peak=st.just(1), memory_peak_max=st.integers(1, 2**50),
    skipped=st.booleans(), time=st.just(1.0), loss_scale=st.none() | st.floats(1, 2**24), moe=st.none() | st.just(MOE),
)  # fmt: skip


def new(**options: object) -> Console:
    return Console(10**7, 1, Terminal(file=io.StringIO(), soft_wrap=True, **options))  # type: ignore[arg-type]


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
def test_the_line_of_a_step(loss: float, skipped: bool, shown: list[str], hidden: list[str]) -> None:
    console = new()
    console.step(replace(STEP, loss=loss, skipped=skipped))
    assert all(text in said(console) for text in shown) and not any(text in said(console) for text in hidden)


@settings(max_examples=40)
@given(steps, st.integers(1, 250))
def test_a_step_is_one_row_of_a_terminal_of_any_width(step: StepRecord, width: int) -> None:
    console = new(force_terminal=True, color_system=None, width=width)
    console.step(step)
    (row,) = said(console).splitlines()
    assert len(row) <= width and (width < 5 or row.startswith("step "))
    if width >= 80:
        assert f"{step.step}/{10**7}" in row and "loss " in row
        assert ("SKIPPED" in row) == step.skipped


@settings(max_examples=40)
@given(steps, st.integers(1, 250))
def test_a_step_is_one_whole_line_of_a_file(step: StepRecord, width: int) -> None:
    console = new(width=width)
    console.step(step)
    (line,) = said(console).splitlines()
    names = ["step ", "loss ", "lr ", "grad ", "TGS ", "FLOPS", "mem ", "left ", "%", "tokens "]
    places = [line.find(f"  {name}" if name.endswith(" ") and name != "step " else name) for name in names]
    assert -1 not in places and places[:-2] == sorted(places[:-2])
    assert ("experts max 1.50x dropped 25.0%" in line) == (step.moe is not None) and ("MFU" in line) == (step.mfu is not None)


def test_what_is_shown_below_the_lines_fits_into_two_rows() -> None:
    for width in (10, 40, 80, 200):
        console = new(force_terminal=True, color_system=None, width=width)
        console.every = 10
        console.begin(1)
        for step in (1, 2):
            console.step(replace(STEP, step=step))
        for doing in ("", "evaluating"):
            console.doing_now = doing
            rows = console.terminal.render_lines(console._below(), pad=False)
            texts = ["".join(segment.text for segment in row) for row in rows]
            assert len(rows) == 2 and all(len(text) <= width for text in texts)  # the line of step 2 does not stay
            assert width < 80 or (doing or "2/10000000  1 tokens") in texts[1]
        console.close()


def test_what_is_being_done_is_a_line_before_the_first_step() -> None:
    console = new()
    with console.doing("reading"):
        assert said(console) == "reading\n"
    console.begin(1)
    with console.doing("evaluating"):
        pass
    console.close()
    assert said(console) == "reading\n"


def test_a_terminal_is_as_before_after_an_error() -> None:
    console = new(force_terminal=True)
    with pytest.raises(ValueError, match="broken"), console.doing("reading"):
        assert console.live is not None
        raise ValueError("broken")
    hidden, shown = "\x1b[?25l", "\x1b[?25h"  # the cursor
    assert console.live is None and said(console).count(hidden) == said(console).count(shown) == 1


@pytest.mark.parametrize("terminal", [True, False])
def test_a_sample_cannot_control_the_terminal(terminal: bool) -> None:
    console = new(force_terminal=terminal, color_system=None, width=40)
    console.sample(3, "a \x1b[31m", "b\x07\rc\n\n" + "long " * 50 + "\n1\n2\n3\n4\n5\n")
    first, *rows = said(console).splitlines()
    assert first == "step 3, a sample:" and rows[0] == "  a \\x1b[31mb\\x07" and len(rows) == 4
    assert max(map(len, rows)) in (39, 122) and not set(said(console)) & set("\x1b\x07\r")


def test_an_evaluation_without_tokens_to_predict_has_no_perplexity() -> None:
    console = new()
    console.valid(ValidRecord(4, math.nan, math.nan, 1.0))
    assert "warning: step 4: no validation loss, because the validation data has no token to predict" in said(console)
    assert "perplexity" not in said(console)


def test_an_evaluation_says_the_losses_of_several_types_only() -> None:
    console = new()
    console.valid(ValidRecord(4, 2.0, 7.389, 1.0, {"en": 2.0}))
    console.valid(ValidRecord(5, 2.0, 7.389, 1.0, {"en": 2.5, "code": 1.5}))
    one, two = said(console).splitlines()
    assert one == "step 4: validation loss 2.0000, perplexity 7.39"
    assert two == "step 5: validation loss 2.0000, perplexity 7.39 | code 1.5000 | en 2.5000"
