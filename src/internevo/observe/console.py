"""The console, with a live line if it is a terminal and plain lines otherwise; and a log file per rank."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
import time
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from rich.cells import cell_len, set_cell_size
from rich.console import Console as Terminal
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from .record import StepRecord, ValidRecord
from .units import amount, clock, duration, flops, size

log = logging.getLogger("internevo")
IMPORTANT = ("step", "loss", "grad", "TGS", "MFU", "lr", "experts", "mem", "speed", "dropped", "scale")
"""The parts of a step's line on a terminal, the most important first."""
SAMPLE_LINES, SAMPLE_WIDTH = 4, 120
"""How much of a sample the console shows; on a terminal, as wide as that is."""


class LogFile(logging.FileHandler):
    """A log file. A run does not end because its log cannot be written; this is said once, with the reason."""

    failed = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Is called by ``logging`` in place of raising an error."""
        if not self.failed:
            self.failed = True
            print(f"warning: {self.baseFilename} cannot be written: {sys.exc_info()[1]}", file=sys.stderr)


def start_log(folder: Path, rank: int, alerts: str | None = None) -> None:
    """Writes this rank's log to a file.

    Args:
        folder: the log folder of the run. The file is rank-N.log in it.
        alerts: file to which rank 0 also writes its warnings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
    log.setLevel(logging.INFO)
    log.propagate = False
    files = [(folder / f"rank-{rank:05d}.log", logging.INFO)]
    if alerts and rank == 0:
        Path(alerts).parent.mkdir(parents=True, exist_ok=True)
        files.append((Path(alerts), logging.WARNING))
    for path, level in files:
        handler = LogFile(path, encoding="utf-8", errors="backslashreplace")
        handler.setLevel(level)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(handler)


class Console:
    """The console of rank 0. If it can no longer be written (a closed pipe, a full disk), the run goes on without it.

    On a terminal a bar stays below the lines, and the line of a step has the parts for which there is room. Elsewhere lines are
    whole.
    """

    def __init__(self, total_steps: int, every: int, terminal: Terminal | None = None) -> None:
        """``every``: number of steps between two lines that stay (``monitor.log_every``)."""
        self.terminal = terminal or Terminal(soft_wrap=True, highlight=False)
        self.total, self.every = total_steps, every
        self.times: list[float] = []
        """Seconds of the last steps."""
        self.training = False
        """Whether the first step has begun."""
        self.last: StepRecord | None = None
        self.doing_now, self.since = "", 0.0
        """What is being done besides steps, and since when."""
        self.live: Live | None = None

    # What is being done ----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Shows what is being done: on a terminal with the seconds that it takes, elsewhere as a line before the first step."""
        log.info(what)
        self.doing_now, self.since = what, time.monotonic()
        own = self.live is None and self.terminal.is_terminal
        if own:
            self._start_live()
        elif not self.training and self.last is None and not self.terminal.is_terminal:
            self._print(what)
        try:
            yield
        finally:
            seconds, self.doing_now = time.monotonic() - self.since, ""
            if own:
                self._stop_live()
                if seconds >= 1 and self.last is None:
                    self._print(f"{what}: {duration(seconds)}")

    def begin(self, step: int) -> None:
        """Must be called before the first step, whose number is ``step``."""
        self.training, self.doing_now, self.since = True, f"step {step}/{self.total}", time.monotonic()
        if self.terminal.is_terminal:
            self._start_live()

    def close(self) -> None:
        """Takes the bar away."""
        self.training = False
        self._stop_live()

    def _start_live(self) -> None:
        with self._may_fail():
            self.live = Live(console=self.terminal, get_renderable=self._below, refresh_per_second=4, transient=True)
            self.live.start()

    def _stop_live(self) -> None:
        if self.live is not None:
            with self._may_fail():
                self.live.stop()
            self.live = None

    def _below(self) -> RenderableType:
        """Returns what a terminal shows below the lines: the last step, unless its line stays, and the bar; one row each."""
        now = f"{self.doing_now} ... {time.monotonic() - self.since:.0f} s" if self.doing_now else ""
        if self.last is None or not self.training:
            return _row(now)
        record, width = self.last, self.terminal.width
        progress = f"{record.step}/{self.total}  {amount(record.consumed_tokens)} tokens  {self._left(record)} left"
        text = f" {self._percent(record)}  {now or progress}"
        bar = ProgressBar(total=self.total, completed=record.step, width=max(4, min(32, width - len(text) - 1)))
        table = Table.grid()
        table.add_row(bar, _row(text))
        return table if self._stays(record) else Group(self._short_line(record), table)

    # Lines -----------------------------------------------------------------------------------------------------------

    def say(self, text: str) -> None:
        """Prints a line that stays, and writes it to the log. May be called from any thread."""
        self._print(text)
        log.info(text)

    def warn(self, text: str) -> None:
        """Prints a warning, and writes it to the log. May be called from any thread."""
        self._print(f"warning: {text}")
        log.warning(text)

    def step(self, record: StepRecord) -> None:
        """Shows a training step."""
        self.times, self.last, self.doing_now = [*self.times[-49:], record.step_time + record.data_time], record, ""
        line = "  ".join([*self._fields(record), *self._marks(record)])
        log.info(line)
        if self._stays(record):
            self._print(self._short_line(record) if self.terminal.is_terminal else line)
        if record.skipped:
            log.warning(f"step {record.step} was skipped: its gradients are not finite ({record.skipped_steps} so far)")
        elif math.isnan(record.loss):
            log.warning(f"step {record.step} has no loss: none of its tokens is to be predicted (all labels are masked)")

    def valid(self, record: ValidRecord) -> None:
        """Shows an evaluation."""
        losses = sorted(record.valid_loss_by_type.items())
        types = "".join(f" | {name} {loss:.4f}" for name, loss in losses) if len(losses) > 1 else ""
        if not record.valid_loss_by_type:
            self.warn(f"step {record.step}: no validation loss, because the validation data has no token to predict")
            return
        self.say(f"step {record.step}: validation loss {record.valid_loss:.4f}, perplexity {record.valid_ppl:.2f}{types}")

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Shows the beginning of what the model writes after a prompt, indented."""
        first, *more = f"{prompt}{text}".expandtabs(4).splitlines() or [""]
        shown = [first, *(line for line in more if line.strip())][:SAMPLE_LINES]
        width = self.terminal.width - 2 if self.terminal.is_terminal else SAMPLE_WIDTH
        lines = "\n".join(f"  {_clip(line, width)}" for line in shown)
        self._print(f"step {step}, a sample:\n{lines}")

    def _print(self, text: str | Text) -> None:
        with self._may_fail():
            if isinstance(text, Text):
                self.terminal.print(text, soft_wrap=False, no_wrap=True, overflow="crop")
            else:
                # A terminal gets whole words on a line. Elsewhere no line is broken.
                self.terminal.print(_printable(text), markup=False, soft_wrap=not self.terminal.is_terminal)

    @contextlib.contextmanager
    def _may_fail(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SystemExit) as error:  # rich turns a closed pipe into SystemExit
            self.terminal.quiet = True
            log.warning(f"the console cannot be written any more ({error!r}); its lines are in this log")
            with contextlib.suppress(OSError), open(os.devnull, "w") as nothing:
                os.dup2(nothing.fileno(), self.terminal.file.fileno())  # else Python fails at exit with what it still holds

    # The line of a step ----------------------------------------------------------------------------------------------

    def _stays(self, record: StepRecord) -> bool:
        """Whether the line of a step stays: that of the first, of every n-th, of the last, and of each that went wrong."""
        first = len(self.times) == 1
        return first or record.step % self.every == 0 or record.step == self.total or bool(self._marks(record))

    def _fields(self, r: StepRecord) -> list[str]:
        """Returns the parts of the whole line."""
        parts = [
            f"step {r.step}/{self.total}", "loss none" if math.isnan(r.loss) else f"loss {r.loss:.4f}",
            f"lr {r.lr:.2e}", f"grad {r.grad_norm:.3f}", f"TGS {r.tgs:,.0f}", flops(r.tflops),
        ]  # fmt: skip
        if r.mfu is not None:
            parts.append(f"MFU {100 * r.mfu:.1f}%")
        if r.loss_scale is not None:
            parts.append(f"scale {r.loss_scale:g}")
        if r.moe is not None:
            parts.append(f"experts max {r.moe['max_load']:.2f}x dropped {100 * r.moe['dropped']:.1f}%")
        memory = f"mem {r.memory_peak_max / 2**30:.2f} GiB"
        return [*parts, memory, f"left {self._left(r)}", self._percent(r).strip(), f"tokens {amount(r.consumed_tokens)}"]

    def _short_line(self, r: StepRecord) -> Text:
        """Returns the line of a step for a terminal: the parts that fit, the most important first."""
        digits = len(str(self.total))
        parts = {
            "step": f"{r.step:>{digits}}/{self.total}",
            "loss": "none  " if math.isnan(r.loss) else f"{r.loss:.4f}" if abs(r.loss) < 1e5 else f"{r.loss:.4g}",
            "lr": f"{r.lr:.2e}",
            "grad": f"{r.grad_norm:<5.3g}",
            "TGS": f"{amount(r.tgs):<5}",
            "MFU": "" if r.mfu is None else f"{100 * r.mfu:.1f}%",
            "experts": "" if r.moe is None else f"{r.moe['max_load']:.2f}x",
            "dropped": f"{100 * r.moe['dropped']:.1f}%" if r.moe and r.moe["dropped"] else "",
            "mem": size(r.memory_peak_max),
            "speed": "" if r.mfu is not None else flops(r.tflops),
            "scale": "" if r.loss_scale is None else f"{r.loss_scale:g}",
        }
        marks = "".join(f"  {mark.partition(' (')[0]}" for mark in self._marks(r))
        left, shown = self.terminal.width - len(marks), set[str]()
        for name in IMPORTANT:
            width = len(name) + 1 + len(parts[name]) + 2 * bool(shown)
            if parts[name] and (width <= left or not shown):
                left -= width
                shown.add(name)
        line = Text(no_wrap=True, overflow="crop")
        for name, value in parts.items():
            if name in shown:
                line.append("  " if line else "").append(f"{name} {value}", "bold" if name == "loss" else "")
        return line.append(marks, "bold red")

    def _marks(self, r: StepRecord) -> list[str]:
        if r.skipped:
            return ["SKIPPED (gradients not finite)"]
        return ["NO LOSS (no token to predict)"] if math.isnan(r.loss) else []

    def _percent(self, r: StepRecord) -> str:
        return f"{math.floor(100 * r.step / self.total):>3}%"

    def _left(self, r: StepRecord) -> str:
        return clock(sorted(self.times)[len(self.times) // 2] * (self.total - r.step))


def _row(text: str) -> Text:
    return Text(_printable(text), no_wrap=True, overflow="ellipsis")


def _clip(text: str, width: int) -> str:
    """Returns text that is at most ``width`` columns wide; where it is cut, it ends with three dots."""
    return text if cell_len(text) <= width else f"{set_cell_size(text, max(0, width - 3)).rstrip()}..."


def _printable(text: str) -> str:
    """Replaces the characters that control a terminal, which a model may write. Lone surrogates are left as they are."""
    return "".join(c if c == "\n" or unicodedata.category(c) != "Cc" else repr(c)[1:-1] for c in text)
