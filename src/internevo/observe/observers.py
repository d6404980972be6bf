"""Everything that watches a run, told of each finished step in the order written here. Rank 0 only."""

from __future__ import annotations

from pathlib import Path

from ..config.run import Monitor
from .console import Console
from .metrics import JsonLines, TensorBoardLog
from .record import StepRecord, ValidRecord
from .report import write_report


class Observers:
    """The console, metrics.jsonl, samples.jsonl, TensorBoard and the report of a run folder."""

    def __init__(self, run: Path, monitor: Monitor, last_step: int, total_steps: int, tensorboard: bool) -> None:
        self.run = run
        self.metrics = JsonLines(run / "metrics.jsonl", last_step)
        self.samples = JsonLines(run / "samples.jsonl", last_step)
        queue = monitor.tensorboard.queue_max_length
        self.tensorboard = TensorBoardLog(run / "tensorboard", last_step, queue) if tensorboard else None
        self.console = Console(last_step + 1, total_steps, monitor.log_every)

    def step(self, record: StepRecord) -> None:
        """One training step is done."""
        self.metrics.write(record.to_dict())
        self.console.step(record)
        if self.tensorboard is not None:
            self.tensorboard.step(record)

    def valid(self, record: ValidRecord) -> None:
        """One evaluation is done."""
        self.metrics.write(record.to_dict())
        self.console.valid(record)
        if self.tensorboard is not None:
            self.tensorboard.valid(record)

    def sample(self, step: int, prompt: str, text: str) -> None:
        """The model has continued ``prompt``."""
        self.samples.write({"step": step, "prompt": prompt, "text": text})

    def close(self) -> None:
        """The run ends, for whatever reason: files are closed and the report is written."""
        self.console.close()
        self.metrics.close()
        self.samples.close()
        if self.tensorboard is not None:
            self.tensorboard.close()
        try:
            self.console.say(f"report: {write_report(self.run)}")
        except OSError as error:
            # The run itself, or the error that ends it, matters more than its report.
            self.console.say(f"the report could not be written ({error}); `internevo report {self.run}` tries again")
