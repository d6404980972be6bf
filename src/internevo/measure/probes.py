"""The probes of a run: ``monitor.memory`` in the first step, ``monitor.comm`` in the second, ``monitor.trace`` in the third."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from ..config.run import Monitor
from ..parallel.data_axis import Weights
from ..parallel.layout import Layout
from ..parallel.memory import Memory
from ..parallel.pipeline import PipelinedModel
from ..parallel.schedule import Schedule, nothing
from ..parallel.strategy import Collectives
from ..storage.jsonfile import write_json
from . import collectives, memory
from .timeline import record_passes, record_timeline

Formulas = Callable[[int], tuple[Memory | None, list[Collectives] | None]]
"""Micro-batches of a step -> the memory of this rank and the collectives, as the strategies state them, if they are known."""


class Probes:
    """Measures single steps. All ranks take part; rank 0 writes the results to the run folder."""

    def __init__(
        self,
        monitor: Monitor,
        layout: Layout,
        model: nn.Module,
        axis: Weights,
        schedule: Schedule,
        state: Mapping[str, Tensor],
        formulas: Formulas,
        folder: Path,
        rank: int,
    ) -> None:
        """
        Args:
            state: master weights (model/NAME) and moments (optimizer/NAME), as DTensors or plain tensors.
        """
        self.monitor, self.layout, self.model, self.axis, self.schedule = monitor, layout, model, axis, schedule
        self.state, self.formulas = state, formulas
        self.folder, self.rank = folder, rank
        self.steps = 0
        """Steps that this process has taken. A resumed run counts from 0 again."""
        self.lines: list[str] = []
        """Lines to print about the last step."""

    @contextmanager
    def __call__(self, micro_batches: int) -> Iterator[None]:
        """The context of one step of this number of micro-batches."""
        self.steps, self.lines = self.steps + 1, []
        monitor = self.monitor
        if monitor.memory and self.steps == 1:
            with self._memory(micro_batches):
                yield
        elif monitor.comm and self.steps == 2:  # not the first step, which also connects the ranks
            with self._collectives(micro_batches):
                yield
        elif monitor.trace and self.steps == 3:
            with self._timeline():
                yield
        else:
            yield

    @contextmanager
    def _timeline(self) -> Iterator[None]:
        path, passes = self.folder / f"trace-rank{self.rank}.json.gz", dict[str, Any]()
        with ExitStack() as stack:
            if isinstance(self.model, PipelinedModel):
                passes = stack.enter_context(record_passes(self.model.channels, self.layout.schedule))
            stack.enter_context(record_timeline(path))
            yield
        self.lines = [f"timeline of step 3: {path} (open it in chrome://tracing or https://ui.perfetto.dev)"]
        if passes and self.rank == 0:
            self._write("timeline.json", passes)
            idle, played = passes["idle"], passes["idle_played"]
            self.lines.append(
                f"timeline of the pipeline's passes: {self.folder / 'timeline.json'} (drawn in report.html); "
                f"the ranks are idle {idle:.1%} of the time (simulated: {played:.1%})"
            )

    @contextmanager
    def _memory(self, micro_batches: int) -> Iterator[None]:
        formula, _ = self.formulas(micro_batches)
        assert formula is not None, "config.check refuses monitor.memory where the formula is not known"
        with memory.Meter(self.model, (*self.axis.masters.values(), *self.axis.copies)) as meter:
            self.schedule.after_pass = meter.read
            try:
                yield
            finally:
                self.schedule.after_pass = nothing
        self._gather(formula, meter.memory(self.state, self.axis.copies, formula.after))

    def _gather(self, formula: Memory, measured: Memory) -> None:
        """Gathers the memory of all ranks, for ``memory.json``, and shows that of the ranks of the first pipeline."""
        ranks: list[Any] = [None] * self.layout.world
        dist.all_gather_object(ranks, memory.OfRank(self.rank, formula, measured))
        self.lines = memory.table([ranks[rank] for rank in self.layout.weights.groups("stage")[0]])
        rows = [{"formula": asdict(rank.formula), "measured": asdict(rank.measured)} for rank in ranks]
        self._write("memory.json", {**rows[0], "ranks": rows})

    @contextmanager
    def _collectives(self, micro_batches: int) -> Iterator[None]:
        with collectives.Counter(self.layout) as counter:
            yield
        rows = counter.rows()
        self.lines = collectives.table(rows, self.layout, self.formulas(micro_batches)[1])
        self._write("comm.json", [asdict(row) for row in rows])

    def _write(self, name: str, values: object) -> None:
        if self.rank == 0:
            write_json(self.folder / name, values, indent=1)
