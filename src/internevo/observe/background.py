"""What trackers of experiments are told. Each has a thread, so that none delays a step, and none that fails or is slow ends a
run. What they have been told is written down, for a run that is resumed."""

from __future__ import annotations

import hashlib
import json
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from ..storage.jsonfile import replace_json
from ..wording import counted
from .record import StepRecord, TaskRecord, ValidRecord

End = Literal["finished", "stopped", "failed"]
"""How a process of a run ends: after the last step; before it, because it was asked to; or with an error."""
IDS = "trackers.json"
"""File in a run folder: the run's ids in its trackers, with which a resumed run continues them, and what they have got."""
ELSEWHERE = (
    "ckpt.", "monitor.", "parallel.", "enable_tb", "JOB_NAME", "model.from_hf", "data.train_folder", "data.valid_folder",
    "data.tokenizer_path",
)  # fmt: skip
"""Beginnings of config keys that do not change what is tracked; paths do not, since a run may be taken elsewhere."""
MOST, PAUSE, RETRY, PATIENCE = 10_000, 5.0, 30.0, 60.0
"""How many entries wait for a tracker; seconds between two writes, each of which takes time of this process; seconds until a
tracker is tried again after a failure; seconds that the end of a run waits."""


@dataclass
class Entry:
    """What a tracker is told about a step."""

    step: int
    time: float
    """Unix time."""
    scalars: dict[str, float] = field(default_factory=dict)
    samples: list[tuple[str, str]] = field(default_factory=list)
    """Prompts, and what the model wrote after them."""

    @classmethod
    def of_step(cls, record: StepRecord) -> Entry:
        """Returns the entry of a training step."""
        scalars = {
            "train/loss": record.loss, "train/grad_norm": record.grad_norm, "train/lr": record.lr,
            "train/tokens": record.consumed_tokens, "train/skipped_steps": record.skipped_steps,
            "speed/tgs": record.tgs, "speed/tflops": record.tflops, "speed/step_time": record.step_time,
            "speed/data_time": record.data_time, "memory/peak_max": record.memory_peak_max,
            **({"speed/mfu": record.mfu} if record.mfu is not None else {}),
            **{f"train/loss/{name}": loss for name, loss in record.loss_by_type.items()},
            **{f"moe/{name}": value for name, value in (record.moe or {}).items() if not isinstance(value, list)},
        }  # fmt: skip
        return cls(record.step, record.time, scalars)

    @classmethod
    def of_evaluation(cls, record: ValidRecord) -> Entry:
        """Returns the entry of an evaluation."""
        by_type = {f"valid/loss/{name}": loss for name, loss in record.valid_loss_by_type.items()}
        return cls(record.step, record.time, {"valid/loss": record.valid_loss, "valid/ppl": record.valid_ppl, **by_type})

    @classmethod
    def of_tasks(cls, record: TaskRecord) -> Entry:
        """Returns the entry of an evaluation on tasks."""
        return cls(record.step, record.time, {f"tasks/{name}": value for name, value in record.values().items()})

    def finite(self) -> dict[str, float]:
        """Returns the scalars that are numbers; not every tracker takes others."""
        return {name: float(value) for name, value in self.scalars.items() if math.isfinite(value)}


@dataclass
class Tracked:
    """What the trackers know of a run."""

    folder: Path
    name: str
    """``JOB_NAME``."""
    identity: str
    """Of the run. It is another one if the folder's run starts again from step 0."""
    last_step: int
    """The step that the run continues after; 0 for a new run."""
    config: dict[str, Any]
    """Key.path -> value."""


class Tracker(Protocol):
    """A tracker. Its methods are called from one thread; any may raise any exception."""

    name: str

    def start(self) -> None:
        """Connects, and begins or continues the run."""

    def write(self, entries: Sequence[Entry]) -> None:
        """Writes entries."""

    def close(self, end: End) -> None:
        """Ends the run. Is called only after ``start``."""


class Ids:
    """What ``trackers.json`` says: the run's id in each tracker, and the last step of each number that the tracker has got.

    What it says of an earlier run in the same folder is forgotten.

    Trackers cannot take back what they have got, and show a step that they get again twice. A run that is resumed from an
    earlier checkpoint repeats steps with the same numbers. These are not sent again, unless the config has changed.
    """

    def __init__(self, run: Tracked, warn: Callable[[str], None] = print) -> None:
        """``warn`` prints a warning. It is called once, if the file cannot be written."""
        self.path, self.warn, self.told, self.lock = run.folder / IDS, warn, False, threading.Lock()
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = None
        if not (isinstance(found, dict) and found.get("run") == run.identity):
            found = {}
        ids, sent, config = found.get("ids"), found.get("sent"), _what_counts(run.config)
        if not isinstance(ids, dict):  # earlier versions wrote the ids next to "run"
            ids = {name: known for name, known in found.items() if isinstance(known, str) and name not in ("run", "config")}
        if not isinstance(sent, dict) or found.get("config") != config:
            sent = {}
        self.known: dict[str, Any] = {"run": run.identity, "ids": ids, "config": config, "sent": sent}
        self.before: dict[str, dict[str, int]] = {name: dict(steps) for name, steps in self.known["sent"].items()}
        """Tracker -> name of a number -> last step, of earlier processes of the run."""

    def get(self, tracker: str) -> str | None:
        """Returns the id in a tracker, if the run has begun there."""
        known = self.known["ids"].get(tracker)
        return known if isinstance(known, str) else None

    def keep(self, tracker: str, known: str) -> None:
        """Stores an id."""
        with self.lock:
            self.known["ids"][tracker] = known
            self._write()

    def new(self, tracker: str, entries: Sequence[Entry]) -> list[Entry]:
        """Returns entries without the numbers and samples that an earlier process of the run has sent to a tracker."""
        sent, found = self.before.get(tracker, {}), list[Entry]()
        for entry in entries:
            scalars = {name: value for name, value in entry.scalars.items() if sent.get(name, -1) < entry.step}
            samples = entry.samples if sent.get("samples", -1) < entry.step else []
            if scalars or samples:
                found.append(replace(entry, scalars=scalars, samples=samples))
        return found

    def sent(self, tracker: str, entries: Sequence[Entry]) -> None:
        """Stores what a tracker has got."""
        with self.lock:
            steps = self.known["sent"].setdefault(tracker, {})
            for entry in entries:
                for name in (*entry.scalars, *(["samples"] if entry.samples else [])):
                    steps[name] = max(entry.step, steps.get(name, -1))
            self._write()

    def _write(self) -> None:
        """Writes the file. If that fails, this process still knows what is in it, and its trackers go on."""
        try:
            replace_json(self.path, self.known, indent=1)
        except OSError as error:
            if not self.told:
                self.told = True
                self.warn(
                    f"{self.path} cannot be written: {error.strerror or error}. The trackers get everything; but if the run is "
                    "resumed before it can be, they may get some steps again, or begin another run"
                )


def _what_counts(config: dict[str, Any]) -> str:
    """Returns a hash of the keys that change what is tracked."""
    counted = {key: value for key, value in config.items() if not key.startswith(ELSEWHERE)}
    if mixture := config.get("data.mixture"):
        counted["data.mixture"] = [{**part, "folder": None} for part in mixture]
    counts = sorted((key, repr(value)) for key, value in counted.items())
    return hashlib.sha256(repr(counts).encode()).hexdigest()[:16]


class Background:
    """Gives a tracker its entries, from a thread. At most ``MOST`` of them wait; what comes after that is lost, and counted."""

    def __init__(
        self,
        tracker: Tracker,
        warn: Callable[[str], None],
        ids: Ids | None = None,
        most: int = MOST,
        pause: float = PAUSE,
        retry: float = RETRY,
    ) -> None:
        """
        Args:
            warn: prints a warning. It is called once after the first failure, and once at the end if something is lost.
            ids: knows what the tracker has already; None: the tracker itself replaces steps that come again.
        """
        self.tracker, self.warn, self.ids, self.most, self.pause, self.retry = tracker, warn, ids, most, pause, retry
        self.waiting: list[Entry] = []
        self.changed = threading.Condition()
        self.closing, self.told, self.lost = False, False, 0
        self.end_of_run: End = "failed"
        self.thread = threading.Thread(target=self._work, name=tracker.name, daemon=True)
        self.thread.start()

    def put(self, entry: Entry) -> None:
        """Adds an entry. Waits for nothing."""
        with self.changed:
            if len(self.waiting) < self.most:
                self.waiting.append(entry)
            else:
                self.lost += 1
            self.changed.notify()

    def ask_to_end(self, end: End) -> None:
        """Makes the thread write what waits, and end."""
        with self.changed:
            self.closing, self.end_of_run = True, end
            self.changed.notify()

    def end(self, deadline: float) -> None:
        """Waits for the thread, until a time (``time.monotonic``)."""
        self.thread.join(max(0.0, deadline - time.monotonic()))
        if self.thread.is_alive():
            self.warn(f"{self.tracker.name} does not answer, and the run does not wait for it any longer")
        if lost := self.lost + len(self.waiting):
            self.warn(f"{self.tracker.name}: lost {counted(lost, 'entry')}; metrics.jsonl has all of them")

    def _work(self) -> None:
        started = False
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.waiting or self.closing)
                batch, last = self.waiting[:], self.closing
            if last and not (batch or started):
                return
            try:
                if not started:
                    self.tracker.start()
                    started = True
                self._write(batch)
                with self.changed:
                    del self.waiting[: len(batch)]
                    ended = self.closing and not self.waiting
                    if not ended:
                        self.changed.wait_for(lambda: self.closing, self.pause)
                if ended:
                    self.tracker.close(self.end_of_run)
                    return
            except Exception as error:  # whatever it is, the run goes on
                self._failed(error)
                if last:
                    return
                with self.changed:
                    self.changed.wait_for(lambda: self.closing, self.retry)

    def _write(self, entries: list[Entry]) -> None:
        if self.ids is None:
            self.tracker.write(entries)
        elif new := self.ids.new(self.tracker.name, entries):
            self.tracker.write(new)
            self.ids.sent(self.tracker.name, new)

    def _failed(self, error: Exception) -> None:
        if not self.told:
            self.told = True
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            self.warn(
                f"{self.tracker.name}: {reason}. The run goes on; {self.tracker.name} is tried again every {self.retry:.0f} s"
            )
