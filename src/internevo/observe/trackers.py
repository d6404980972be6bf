"""Trackers of experiments behind one interface: TensorBoard, Weights & Biases, MLflow, trackio.

Each has a thread of its own, in which its library is imported: none delays a step, and none that fails or is slow ends a run.
"""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ..config.run import Monitor
from ..storage.jsonfile import replace_json
from .record import StepRecord, TaskRecord, ValidRecord

IDS = "trackers.json"
"""File in a run folder: the run's ids in its trackers, with which a resumed run continues them."""
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

    def close(self) -> None:
        """Ends the run. Is called only after ``start``."""


class Ids:
    """The run's ids in its trackers, in ``trackers.json``. Those of an earlier run in the same folder are forgotten."""

    def __init__(self, run: Tracked) -> None:
        self.path, self.lock = run.folder / IDS, threading.Lock()
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = None
        self.known = found if isinstance(found, dict) and found.get("run") == run.identity else {"run": run.identity}

    def get(self, tracker: str) -> str | None:
        """Returns the id in a tracker, if the run has begun there."""
        known = self.known.get(tracker)
        return known if isinstance(known, str) else None

    def keep(self, tracker: str, known: str) -> None:
        """Stores an id."""
        with self.lock:
            self.known[tracker] = known
            replace_json(self.path, self.known, indent=1)


class Background:
    """Gives a tracker its entries, from a thread. At most ``MOST`` of them wait; what comes after that is lost, and counted."""

    def __init__(
        self, tracker: Tracker, warn: Callable[[str], None], most: int = MOST, pause: float = PAUSE, retry: float = RETRY
    ) -> None:
        """``warn``: prints a warning. It is called once after the first failure, and once at the end if something is lost."""
        self.tracker, self.warn, self.most, self.pause, self.retry = tracker, warn, most, pause, retry
        self.waiting: list[Entry] = []
        self.changed = threading.Condition()
        self.closing, self.told, self.lost = False, False, 0
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

    def ask_to_end(self) -> None:
        """Makes the thread write what waits, and end."""
        with self.changed:
            self.closing = True
            self.changed.notify()

    def end(self, deadline: float) -> None:
        """Waits for the thread, until a time (``time.monotonic``)."""
        self.thread.join(max(0.0, deadline - time.monotonic()))
        if self.thread.is_alive():
            self.warn(f"{self.tracker.name} does not answer, and the run does not wait for it any longer")
        if lost := self.lost + len(self.waiting):
            self.warn(f"{self.tracker.name}: {lost} entries are lost; metrics.jsonl has all of them")

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
                self.tracker.write(batch)
                with self.changed:
                    del self.waiting[: len(batch)]
                    ended = self.closing and not self.waiting
                    if not ended:
                        self.changed.wait_for(lambda: self.closing, self.pause)
                if ended:
                    self.tracker.close()
                    return
            except Exception as error:  # whatever it is, the run goes on
                self._failed(error)
                if last:
                    return
                with self.changed:
                    self.changed.wait_for(lambda: self.closing, self.retry)

    def _failed(self, error: Exception) -> None:
        if not self.told:
            self.told = True
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            self.warn(
                f"{self.tracker.name}: {reason}. The run goes on; {self.tracker.name} is tried again every {self.retry:.0f} s"
            )


def make_trackers(monitor: Monitor, run: Tracked, tensorboard: bool, warn: Callable[[str], None]) -> list[Background]:
    """Makes the trackers of a run (``monitor.trackers``), and TensorBoard's."""
    ids = Ids(run)
    kinds: dict[str, Callable[[Monitor, Tracked, Ids], Tracker]] = {"wandb": WandB, "mlflow": MLflow, "trackio": Trackio}
    made = [kinds[name](monitor, run, ids) for name in monitor.trackers]
    if tensorboard:
        made.append(TensorBoard(run, monitor.tensorboard.queue_max_length))
    return [Background(tracker, warn) for tracker in made]


def close_trackers(trackers: Sequence[Background], patience: float = PATIENCE) -> None:
    """Ends all trackers at the same time, and waits at most ``patience`` seconds for them."""
    for tracker in trackers:
        tracker.ask_to_end()
    deadline = time.monotonic() + patience
    for tracker in trackers:
        tracker.end(deadline)


class TensorBoard:
    """Writes TensorBoard's files."""

    name = "TensorBoard"

    def __init__(self, run: Tracked, queue: int) -> None:
        """``queue``: number of scalars in memory before they are written."""
        self.run, self.queue = run, queue

    def start(self) -> None:
        """TensorBoard then hides what was written for later steps before a resume."""
        from torch.utils.tensorboard import SummaryWriter

        folder, after = str(self.run.folder / "tensorboard"), self.run.last_step + 1
        self.writer: Any = SummaryWriter(folder, purge_step=after, max_queue=self.queue)

    def write(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            for name, value in entry.scalars.items():
                self.writer.add_scalar(name, value, entry.step, walltime=entry.time)
            for prompt, text in entry.samples:
                self.writer.add_text(f"samples/{prompt}", f"```\n{prompt}{text}\n```", entry.step, walltime=entry.time)

    def close(self) -> None:
        self.writer.close()


class WandB:
    """Weights & Biases."""

    name = "wandb"

    def __init__(self, monitor: Monitor, run: Tracked, ids: Ids) -> None:
        self.options, self.run, self.ids = monitor.wandb, run, ids

    def start(self) -> None:
        """The id is ours, so that a run that has begun offline is continued too."""
        import wandb

        mode = self.options.mode
        if mode == "online" and not wandb.login(prompt=False):
            raise RuntimeError("there is no API key: `wandb login`, WANDB_API_KEY, or monitor.wandb.mode=offline")
        known = self.ids.get(self.name) or self.run.identity
        self.ids.keep(self.name, known)
        self.wandb, options = wandb, self.options
        self.writer = wandb.init(
            project=options.project or self.run.name, entity=options.entity, group=options.group, tags=list(options.tags),
            name=options.name or self.run.name, id=known, resume="allow", mode=mode, dir=str(self.run.folder),
            config=self.run.config, settings=wandb.Settings(silent=True, console="off", init_timeout=PATIENCE),
        )  # fmt: skip
        # The steps of a resumed run may have been logged before; wandb's own step never goes back.
        self.writer.define_metric("step")
        self.writer.define_metric("*", step_metric="step")

    def write(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            values: dict[str, Any] = {"step": entry.step, **entry.scalars}
            if entry.samples:
                rows = [[entry.step, prompt, text] for prompt, text in entry.samples]
                values["samples"] = self.wandb.Table(columns=["step", "prompt", "text"], data=rows)
            self.writer.log(values)

    def close(self) -> None:
        self.writer.finish()


class MLflow:
    """MLflow. Samples are not logged there."""

    name = "mlflow"
    METRICS, PARAMETERS = 1000, 100
    """How many a server takes at once."""

    def __init__(self, monitor: Monitor, run: Tracked, ids: Ids) -> None:
        self.options, self.run, self.ids = monitor.mlflow, run, ids

    def start(self) -> None:
        """Creates the run in the experiment, or continues it."""
        from mlflow import MlflowClient
        from mlflow.entities import Param

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        self.client = MlflowClient(tracking_uri=self.options.tracking_uri)
        known = self.ids.get(self.name)
        if known is not None:
            self.client.update_run(known, status="RUNNING")
        else:
            name = self.options.experiment or self.run.name
            found = self.client.get_experiment_by_name(name)
            experiment = found.experiment_id if found else self.client.create_experiment(name)
            known = self.client.create_run(experiment, run_name=self.run.name).info.run_id
            self.ids.keep(self.name, known)
            parameters = [Param(key, str(value)[:500]) for key, value in self.run.config.items()]
            for at in range(0, len(parameters), self.PARAMETERS):
                self.client.log_batch(known, params=parameters[at : at + self.PARAMETERS])
        self.known = known

    def write(self, entries: Sequence[Entry]) -> None:
        from mlflow.entities import Metric

        metrics = [
            Metric(name, value, round(1000 * entry.time), entry.step)
            for entry in entries for name, value in entry.finite().items()
        ]  # fmt: skip
        for at in range(0, len(metrics), self.METRICS):
            self.client.log_batch(self.known, metrics=metrics[at : at + self.METRICS])

    def close(self) -> None:
        self.client.set_terminated(self.known)


class Trackio:
    """Hugging Face's trackio: files on this machine, or a Space. Samples are not logged there."""

    name = "trackio"

    def __init__(self, monitor: Monitor, run: Tracked, ids: Ids) -> None:
        self.options, self.run, self.ids = monitor.trackio, run, ids

    def start(self) -> None:
        """trackio continues the run that has this name."""
        import trackio

        known = self.ids.get(self.name) or f"{self.run.name}-{self.run.identity[:6]}"
        self.ids.keep(self.name, known)
        options = self.options
        self.writer = trackio.init(
            options.project or self.run.name, name=known, space_id=options.space_id, resume="allow", embed=False,
            config={key: str(value) for key, value in self.run.config.items()},
        )  # fmt: skip

    def write(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            if values := entry.finite():
                self.writer.log(values, step=entry.step)

    def close(self) -> None:
        self.writer.finish()
