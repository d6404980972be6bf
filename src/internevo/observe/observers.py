"""The observers of a run, on rank 0. After each step they are called in the order written here."""

from __future__ import annotations

from pathlib import Path

from ..config.run import Monitor
from .console import Console
from .metrics import JsonLines, TensorBoardLog
from .record import StepRecord, TaskRecord, ValidRecord
from .report import write_report


class Observers:
    """The console, metrics.jsonl, samples.jsonl, TensorBoard and the report of a run folder."""

    def __init__(self, run: Path, monitor: Monitor, last_step: int, total_steps: int, tensorboard: bool) -> None:
        """
        Args:
            run: the run folder.
            last_step: the step that the run continues after; 0 for a new run.
            total_steps: ``data.total_steps``.
            tensorboard: whether to write TensorBoard's files.
        """
        self.run = run
        self.metrics = JsonLines(run / "metrics.jsonl", last_step)
        self.samples = JsonLines(run / "samples.jsonl", last_step)
        queue = monitor.tensorboard.queue_max_length
        self.tensorboard = TensorBoardLog(run / "tensorboard", last_step, queue) if tensorboard else None
        self.console = Console(last_step + 1, total_steps, monitor.log_every)

    def step(self, record: StepRecord) -> None:
        """Must be called after each training step."""
        self.metrics.write(record.to_dict())
        self.console.step(record)
        if self.tensorboard is not None:
            self.tensorboard.step(record)

    def valid(self, record: ValidRecord) -> None:
        """Must be called after each evaluation."""
        self.metrics.write(record.to_dict())
        self.console.valid(record)
        if self.tensorboard is not None:
            self.tensorboard.valid(record)

    def tasks(self, record: TaskRecord) -> None:
        """Must be called after each evaluation on tasks."""
        self.metrics.write(record.to_dict())
        self.console.say(f"step {record.step}: " + ", ".join(f"{name} {value:.4f}" for name, value in record.values().items()))
        if self.tensorboard is not None:
            self.tensorboard.tasks(record)

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Writes a sample: the text that the model generated after ``prompt``."""
        self.samples.write({"step": step, "prompt": prompt, "text": text})

    def close(self) -> None:
        """Closes all files and writes the report. Must be called at the end of a run, also after an error."""
        self.console.close()
        self.metrics.close()
        self.samples.close()
        if self.tensorboard is not None:
            self.tensorboard.close()
        try:
            self.console.say(f"report: {write_report(self.run)}")
        except Exception as error:
            # The result of the run, or the error that ends it, matters more than the report.
            self.console.say(f"the report could not be written ({error!r}); try again with: internevo report {self.run}")
