"""What ``monitor.memory``, ``.comm`` and ``.trace`` ask for: probes of the first, the second and the third step of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from ..config.run import Monitor
from ..models.decoder import Decoder
from ..parallel.layout import Layout
from ..parallel.memory import Memory
from ..parallel.shards import local
from ..parallel.strategy import Collectives
from ..storage.jsonfile import write_json
from . import collectives, memory
from .timeline import record_timeline


class Probes:
    """Measures single steps. Every rank takes part; rank 0 writes files to the run folder, and has lines to show."""

    def __init__(
        self,
        monitor: Monitor,
        layout: Layout,
        model: Decoder,
        state: Mapping[str, Tensor],
        formula: tuple[Memory, list[Collectives]] | None,
        folder: Path,
        rank: int,
    ) -> None:
        """
        Args:
            state: fp32 weights (model/NAME) and moments (optimizer/NAME) of this run, as DTensors or plain tensors.
            formula: memory and collectives of a step as the strategies state them, to be shown beside what is measured.
        """
        self.monitor, self.layout, self.model, self.state, self.formula = monitor, layout, model, state, formula
        self.folder, self.rank = folder, rank
        self.steps = 0
        """Steps of this process, whether the run was resumed or not."""
        self.lines: list[str] = []
        """For people, about the last step."""

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Around one step."""
        self.steps, self.lines = self.steps + 1, []
        monitor = self.monitor
        if monitor.memory and self.steps == 1:
            with self._memory():
                yield
        elif monitor.comm and self.steps == 2:  # the first one also makes connections
            with self._collectives():
                yield
        elif monitor.trace and self.steps == 3:
            path = self.folder / f"trace-rank{self.rank}.json.gz"
            with record_timeline(path):
                yield
            self.lines = [f"timeline of step 3: {path} (chrome://tracing, or https://ui.perfetto.dev)"]
        else:
            yield

    @contextmanager
    def _memory(self) -> Iterator[None]:
        with memory.Meter(self.model) as meter:
            yield
        held = {name: local(tensor) for name, tensor in self.state.items()}
        storages = {tensor.untyped_storage().data_ptr() for tensor in held.values()}
        masters, moments = (
            sum(tensor.nbytes for name, tensor in held.items() if name.startswith(kind)) for kind in ("model/", "optimizer/")
        )
        weights = [local(weight.detach()) for weight in self.model.parameters()]
        copies = sum(weight.nbytes for weight in weights if weight.untyped_storage().data_ptr() not in storages)
        found = meter.memory(masters, moments, copies)
        formula = self.formula and self.formula[0]
        self.lines = memory.table(formula, found)
        self._write("memory.json", {"formula": formula and asdict(formula), "measured": asdict(found)})

    @contextmanager
    def _collectives(self) -> Iterator[None]:
        with collectives.Counter(self.layout) as counter:
            yield
        rows = counter.rows()
        self.lines = collectives.table(rows, self.layout, self.formula and self.formula[1])
        self._write("comm.json", [asdict(row) for row in rows])

    def _write(self, name: str, values: object) -> None:
        if self.rank == 0:
            write_json(self.folder / name, values, indent=1)
