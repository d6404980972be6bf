"""The console, with a live line if it is a terminal and plain lines otherwise; and a log file per rank."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

from rich.console import Console as Terminal
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from .record import StepRecord, ValidRecord

log = logging.getLogger("internevo")


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
    """The console of rank 0. If it can no longer be written (a closed pipe, a full disk), the run goes on without it."""

    def __init__(self, first_step: int, total_steps: int, every: int, terminal: Terminal | None = None) -> None:
        """``every``: number of steps between two plain lines (``monitor.log_every``)."""
        self.terminal = terminal or Terminal(soft_wrap=True, highlight=False)
        self.first, self.total, self.every = first_step, total_steps, every
        self.times: list[float] = []
        self.live: Live | None = None
        if self.terminal.is_terminal:
            self.live = Live(Text("starting"), console=self.terminal, refresh_per_second=4, transient=False)
            self.live.start()

    def say(self, text: str) -> None:
        """Prints a line that stays, and writes it to the log."""
        self._print(text)
        log.info(text)

    def warn(self, text: str) -> None:
        """Prints a warning, and writes it to the log. May be called from any thread."""
        self._print(f"warning: {text}")
        log.warning(text)

    def step(self, record: StepRecord) -> None:
        """Shows a training step."""
        self.times = [*self.times[-49:], record.step_time + record.data_time]
        line = self._line(record)
        log.info(line)
        if self.live is not None:
            bar = ProgressBar(total=self.total, completed=record.step, width=24)
            table = Table.grid(padding=(0, 1))
            table.add_row(bar, Text(line))
            self.live.update(table)
        elif record.step % self.every == 0 or record.step in (self.first, self.total) or record.skipped:
            self._print(line)
        if record.skipped:
            log.warning(f"step {record.step} was skipped: its gradients are not finite ({record.skipped_steps} so far)")
        elif math.isnan(record.loss):
            log.warning(f"step {record.step} has no loss: none of its tokens is to be predicted (all labels are masked)")

    def valid(self, record: ValidRecord) -> None:
        """Shows an evaluation."""
        types = "".join(f" | {name} {loss:.4f}" for name, loss in sorted(record.valid_loss_by_type.items()))
        if not record.valid_loss_by_type:
            self.warn(f"step {record.step}: no validation loss, because the validation data has no token to predict")
            return
        self.say(f"step {record.step}: validation loss {record.valid_loss:.4f}, perplexity {record.valid_ppl:.2f}{types}")

    def close(self) -> None:
        """Ends the live line. Its last content stays."""
        if self.live is not None:
            with self._may_fail():
                self.live.stop()
            self.live = None

    def _print(self, text: str) -> None:
        with self._may_fail():
            self.terminal.print(text, markup=False)

    @contextlib.contextmanager
    def _may_fail(self) -> Iterator[None]:
        try:
            yield
        except (OSError, SystemExit) as error:  # rich turns a closed pipe into SystemExit
            self.terminal.quiet = True
            log.warning(f"the console cannot be written any more ({error!r}); its lines are in this log")
            with contextlib.suppress(OSError), open(os.devnull, "w") as nothing:
                os.dup2(nothing.fileno(), self.terminal.file.fileno())  # else Python fails at exit with what it still holds

    def _line(self, r: StepRecord) -> str:
        left = timedelta(seconds=round(sorted(self.times)[len(self.times) // 2] * (self.total - r.step)))
        parts = [
            f"step {r.step}/{self.total}", "loss none" if math.isnan(r.loss) else f"loss {r.loss:.4f}",
            f"lr {r.lr:.2e}", f"grad {r.grad_norm:.3f}",
            f"TGS {r.tgs:,.0f}", f"{r.tflops:.3g} TFLOPS",
        ]  # fmt: skip
        if r.mfu is not None:
            parts.append(f"MFU {100 * r.mfu:.1f}%")
        if r.loss_scale is not None:
            parts.append(f"scale {r.loss_scale:g}")
        if r.moe is not None:
            parts.append(f"experts max {r.moe['max_load']:.2f}x dropped {100 * r.moe['dropped']:.1f}%")
        parts += [f"mem {r.memory_peak_max / 2**30:.2f} GiB", f"left {left}"]
        if r.skipped:
            parts.append("SKIPPED (gradients not finite)")
        elif math.isnan(r.loss):
            parts.append("NO LOSS (no token to predict)")
        return "  ".join(parts)
