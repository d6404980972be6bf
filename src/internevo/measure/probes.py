"""The probes of a run: ``monitor.memory`` in the first step, ``monitor.comm`` in the second, ``monitor.trace`` in the third."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..config.run import Monitor
from ..parallel.layout import Layout
from ..parallel.memory import Memory
from ..parallel.pipeline import PipelinedModel
from ..parallel.shards import local
from ..parallel.strategy import Collectives
from ..storage.jsonfile import write_json
from . import collectives, memory
from .timeline import record_passes, record_timeline


class Probes:
    """Measures single steps. All ranks take part; rank 0 writes the results to the run folder."""

    def __init__(
        self,
        monitor: Monitor,
        layout: Layout,
        model: nn.Module,
        state: Mapping[str, Tensor],
        formula: tuple[Memory | None, list[Collectives] | None],
        folder: Path,
        rank: int,
    ) -> None:
        """
        Args:
            state: master weights (model/NAME) and moments (optimizer/NAME), as DTensors or plain tensors.
            formula: the memory and the collectives of a step as the strategies state them, if they are known.
        """
        self.monitor, self.layout, self.model, self.state, self.formula = monitor, layout, model, state, formula
        self.folder, self.rank = folder, rank
        self.steps = 0
        """Steps that this process has taken. A resumed run counts from 0 again."""
        self.lines: list[str] = []
        """Lines to print about the last step."""

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """The context of one step."""
        self.steps, self.lines = self.steps + 1, []
        monitor = self.monitor
        if monitor.memory and self.steps == 1:
            with self._memory():
                yield
        elif monitor.comm and self.steps == 2:  # not the first step, which also connects the ranks
            with self._collectives():
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
    def _memory(self) -> Iterator[None]:
        with memory.Meter(self.model) as meter:
            yield
        state = {name: local(tensor) for name, tensor in self.state.items()}
        storages = {tensor.untyped_storage().data_ptr() for tensor in state.values()}
        masters, moments = (
            sum(tensor.nbytes for name, tensor in state.items() if name.startswith(kind)) for kind in ("model/", "optimizer/")
        )
        weights = [local(weight.detach()) for weight in self.model.parameters()]
        copies = sum(w.nbytes for w in weights if w.untyped_storage().data_ptr() not in storages)
        measured = meter.memory(masters, moments, copies)
        formula = self.formula[0]
        self.lines = memory.table(formula, measured)
        self._write("memory.json", {"formula": formula and asdict(formula), "measured": asdict(measured)})

    @contextmanager
    def _collectives(self) -> Iterator[None]:
        with collectives.Counter(self.layout) as counter:
            yield
        rows = counter.rows()
        self.lines = collectives.table(rows, self.layout, self.formula[1])
        self._write("comm.json", [asdict(row) for row in rows])

    def _write(self, name: str, values: object) -> None:
        if self.rank == 0:
            write_json(self.folder / name, values, indent=1)
