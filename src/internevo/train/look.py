"""What ``monitor.memory``, ``.comm`` and ``.trace`` ask for: a look into the first, the second and the third step of a run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from ..config import Config
from ..data.batches import StepBatch
from ..models import Decoder
from ..parallel import memory, traffic
from ..parallel.collectives import local
from ..parallel.layout import Layout
from .optimizer import Optimizer


class LookIntoSteps:
    """Looks into single steps. Every rank takes part; rank 0 writes files to the run folder, and has lines to say."""

    def __init__(self, config: Config, layout: Layout, model: Decoder, optimizer: Optimizer, folder: Path, rank: int) -> None:
        self.config, self.layout, self.model, self.optimizer = config, layout, model, optimizer
        self.folder, self.rank = folder, rank
        self.steps = 0
        """Of this process, resumed or not."""
        self.lines: list[str] = []
        """For people, of the last step."""

    @contextmanager
    def __call__(self, batch: StepBatch) -> Iterator[None]:
        """Around one step."""
        self.steps, self.lines = self.steps + 1, []
        monitor = self.config.monitor
        if monitor.memory and self.steps == 1:
            with self._memory(batch):
                yield
        elif monitor.comm and self.steps == 2:  # the first one also makes connections
            with self._collectives():
                yield
        elif monitor.trace and self.steps == 3:
            with self._trace():
                yield
        else:
            yield

    @contextmanager
    def _memory(self, batch: StepBatch) -> Iterator[None]:
        with memory.Meter(self.model) as meter:
            yield
        masters = {id(master): local(master).nbytes for master in self.optimizer.named.values()}
        moments = sum(local(moment).nbytes for moment in self.optimizer.state().values())
        weights = sum(weight.nbytes for weight in self.model.parameters() if id(weight) not in masters)
        found = meter.memory(sum(masters.values()), moments, weights)
        plan = memory.planned(self.model.config, self.config, self.layout, batch.micro_batches[-1].tokens.numel())
        self.lines = memory.table(plan, found)
        self._write("memory.json", {"formula": asdict(plan), "measured": asdict(found)})

    @contextmanager
    def _collectives(self) -> Iterator[None]:
        with traffic.Counter(self.layout) as counter:
            yield
        rows, groups = counter.rows(), self.layout.groups()
        self.lines = traffic.table(rows, lambda axis: len(groups[axis][0]) if axis in groups else self.layout.world)
        self._write("comm.json", [asdict(row) for row in rows])

    @contextmanager
    def _trace(self) -> Iterator[None]:
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        with profile(activities=activities) as profiler:
            yield
        path = self.folder / f"trace-rank{self.rank}.json.gz"
        profiler.export_chrome_trace(str(path))
        self.lines = [f"timeline of step 3: {path} (chrome://tracing, or https://ui.perfetto.dev)"]

    def _write(self, name: str, values: object) -> None:
        if self.rank == 0:
            (self.folder / name).write_text(json.dumps(values, indent=1), encoding="utf-8")
