"""Trackers of experiments behind one interface: TensorBoard, Weights & Biases, MLflow, trackio. Each library is imported in its
tracker's thread."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from ..config.run import Monitor
from .background import PATIENCE, Background, End, Entry, Ids, Tracked, Tracker


def make_trackers(monitor: Monitor, run: Tracked, tensorboard: bool, warn: Callable[[str], None]) -> list[Background]:
    """Makes the trackers of a run (``monitor.trackers``), and TensorBoard's."""
    ids = Ids(run, warn)
    kinds: dict[str, Callable[[Monitor, Tracked, Ids], Tracker]] = {"wandb": WandB, "mlflow": MLflow, "trackio": Trackio}
    made = [Background(kinds[name](monitor, run, ids), warn, ids) for name in monitor.trackers]
    if tensorboard:
        made.append(Background(TensorBoard(run, monitor.tensorboard.queue_max_length), warn))
    return made


def close_trackers(trackers: Sequence[Background], end: End, patience: float = PATIENCE) -> None:
    """Ends all trackers at the same time, and waits at most ``patience`` seconds for them."""
    for tracker in trackers:
        tracker.ask_to_end(end)
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

    def close(self, end: End) -> None:
        self.writer.close()


class WandB:
    """Weights & Biases."""

    name = "wandb"
    CODES: ClassVar[dict[End, int]] = {"finished": 0, "stopped": 255, "failed": 1}
    """Exit codes, as wandb reports them itself; 255 after Ctrl-C."""

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
        # wandb's own step is the number of the entry, and not that of the step.
        self.writer.define_metric("step")
        self.writer.define_metric("*", step_metric="step")

    def write(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            values: dict[str, Any] = {"step": entry.step, **entry.scalars}
            if entry.samples:
                rows = [[entry.step, prompt, text] for prompt, text in entry.samples]
                values["samples"] = self.wandb.Table(columns=["step", "prompt", "text"], data=rows)
            self.writer.log(values)

    def close(self, end: End) -> None:
        self.writer.finish(exit_code=self.CODES[end])


class MLflow:
    """MLflow. Samples are not logged there."""

    name = "mlflow"
    METRICS, PARAMETERS = 1000, 100
    """How many a server takes at once."""
    STATES: ClassVar[dict[End, str]] = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}

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

    def close(self, end: End) -> None:
        self.client.set_terminated(self.known, self.STATES[end])


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

    def close(self, end: End) -> None:
        self.writer.finish()
