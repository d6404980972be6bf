"""The observers of a run, on rank 0. After each step they are called in the order written here."""

from __future__ import annotations

import contextlib
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

from ..config.run import Monitor
from ..errors import InternEvoError
from ..wording import counted
from .background import End, Entry, Tracked
from .console import Console
from .metrics import JsonLines
from .record import SaveRecord, StepRecord, TaskRecord, ValidRecord
from .report import write_report
from .trackers import close_trackers, make_trackers
from .units import amount, duration, size


class Progress(NamedTuple):
    """How far a run has come."""

    total: int
    """The steps that the config asks for (``data.total_steps``)."""
    since_start: int
    """The steps since the start of the process."""
    skipped: int
    """How many of ``total`` are batches that the config leaves out."""
    done: bool
    """Whether no other step is left to train."""


class Observers:
    """The console, metrics.jsonl, samples.jsonl, events.jsonl, the trackers and the report of a run folder."""

    def __init__(self, console: Console, monitor: Monitor, run: Tracked, tensorboard: bool) -> None:
        """``tensorboard``: whether to write TensorBoard's files."""
        folder, last_step = run.folder, run.last_step
        self.run, self.console = folder, console
        self.metrics = JsonLines(folder / "metrics.jsonl", last_step)
        self.samples = JsonLines(folder / "samples.jsonl", last_step)
        self.events = JsonLines(folder / "events.jsonl", last_step)
        self.last_step = last_step
        self.trackers = make_trackers(monitor, run, tensorboard, console.warn)
        self.last: StepRecord | None = None
        self.last_valid: ValidRecord | None = None
        self.checkpoint: Path | None = None
        """The newest that has been saved since the start."""
        self.end: End = "failed"

    def start(self, facts: dict[str, Any]) -> None:
        """Must be called before the first step. ``facts``: what the report says about the run."""
        self._event("start", self.last_step, time.time(), facts)

    def _event(self, event: str, step: int, when: float, facts: dict[str, Any] | None = None) -> None:
        self.events.write({"step": step, "time": when, "event": event, **(facts or {})})

    def step(self, record: StepRecord) -> None:
        """Must be called after each training step."""
        self.last = record
        self.metrics.write(record.to_dict())
        self.console.step(record)
        self._track(Entry.of_step(record))

    def valid(self, record: ValidRecord) -> None:
        """Must be called after each evaluation."""
        self.last_valid = record
        self.metrics.write(record.to_dict())
        self.console.valid(record)
        self._track(Entry.of_evaluation(record))

    def tasks(self, record: TaskRecord) -> None:
        """Must be called after each evaluation on tasks."""
        self.metrics.write(record.to_dict())
        self.console.say(f"step {record.step}: " + ", ".join(f"{name} {value:.4f}" for name, value in record.values().items()))
        self._track(Entry.of_tasks(record))

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Writes a sample: the text that the model generated after ``prompt``."""
        self.samples.write({"step": step, "prompt": prompt, "text": text})
        self.console.sample(step, prompt, text)
        self._track(Entry(step, time.time(), samples=[(prompt, text)]))

    def _track(self, entry: Entry) -> None:
        for tracker in self.trackers:
            tracker.put(entry)

    def saved(self, record: SaveRecord) -> None:
        """Must be called after each checkpoint or snapshot that is complete."""
        if not record.snapshot:
            self.checkpoint = record.folder
        facts = {"folder": str(record.folder), "bytes": record.nbytes, "seconds": record.seconds}
        self._event("snapshot" if record.snapshot else "save", record.step, record.time, facts)
        what = f"saved step {record.step}" + (" as a snapshot" if record.snapshot else "")
        self.console.say(f"{what}: {record.folder} ({size(record.nbytes)}, {duration(record.seconds)} in the background)")

    def summary(self, progress: Progress, seconds: float, how: str) -> None:
        """Prints what has been trained, where it is, and how to go on. Must be called at the end, if there was no error.

        Args:
            progress: how far the run has come.
            seconds: the time that the steps since the start of the process took.
            how: how to go on from the checkpoint.
        """
        last, valid, checkpoint = self.last, self.last_valid, self.checkpoint
        total, steps, skipped, done = progress
        self.end = "finished" if done else "stopped"
        if last is None:
            return
        self.console.close()
        since = "" if steps == last.step else f" ({steps} of them since this start)"
        left_out = f", of which data.skip_batches left out {skipped}" if done and skipped else ""
        results = ["no loss in the last step" if math.isnan(last.loss) else f"loss {last.loss:.4f}"]
        if valid and valid.valid_loss_by_type:
            results.append(f"validation loss {valid.valid_loss:.4f} (perplexity {valid.valid_ppl:.2f}, step {valid.step})")
        if last.skipped_steps:
            results.append(f"{counted(last.skipped_steps, 'step')} skipped")
        lines = [
            f"{'done' if done else 'stopped'}: {total if done else last.step:,} of {counted(total, 'step')}{left_out}{since}, "
            f"{amount(last.consumed_tokens)} tokens, in {duration(seconds)}",
            f"  {', '.join(results)}",
            f"  checkpoint: {checkpoint}" if checkpoint else "  no checkpoint (ckpt.enable_save_ckpt = False)",
        ]
        if checkpoint:
            lines.append(f"  {how}")
        for line in lines:
            self.console.say(line)

    def close(self) -> None:
        """Closes all files and writes the report. Must be called at the end of a run, also after an error."""
        self.console.close()
        self.metrics.close()
        self.samples.close()
        with contextlib.suppress(OSError, InternEvoError):  # the disk is full: what ends the run matters more
            if self.last is not None:
                self._event("stop", self.last.step, time.time())
            self.events.close()
        if self.trackers:
            with self.console.doing("finishing the trackers"):
                close_trackers(self.trackers, self.end)
        try:
            self.console.say(f"report: {write_report(self.run)}")
        except Exception as error:
            # The result of the run, or the error that ends it, matters more than the report.
            self.console.say(f"the report could not be written ({error!r}); try again with: internevo report {self.run}")
