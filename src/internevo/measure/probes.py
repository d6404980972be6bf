"""The probes of a run: ``monitor.memory`` in the first step after a start, ``monitor.comm`` in the second, ``monitor.trace`` in
the third."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..config.run import Monitor
from ..observe.memory import KINDS
from ..ops.compiler import running_uncompiled
from ..parallel.data_axis import Weights
from ..parallel.layout import Layout
from ..parallel.memory import Memory
from ..parallel.orders import Action, stages_on
from ..parallel.pipeline import PipelinedModel
from ..parallel.schedule import Schedule, nothing
from ..parallel.strategy import Collectives
from ..storage.jsonfile import write_json
from ..storage.naming import naming
from . import collectives, memory
from .allocator import Usage, watch
from .profile import Profile
from .replay import replay
from .timeline import record_passes, record_timeline

Formulas = Callable[[int], tuple[Memory | None, list[Collectives] | None]]
"""Micro-batches of a step -> the memory of this rank and the collectives, as the strategies state them, if they are known."""
FORMAT = "memory profile 1"
"""Says in ``memory/rank-N.json`` what it is, with the version of its format."""


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
        device: torch.device,
        compiles: bool,
    ) -> None:
        """
        Args:
            state: master weights (model/NAME) and moments (optimizer/NAME), as DTensors or plain tensors.
            compiles: whether layers are compiled in the first step that may run compiled.
        """
        self.monitor, self.layout, self.model, self.axis, self.schedule = monitor, layout, model, axis, schedule
        self.state, self.formulas = state, formulas
        self.folder, self.rank, self.device = folder, rank, device
        self.steps = 0
        """Steps that this process has taken. A resumed run counts from 0 again."""
        self.step = 0
        """The number of the step in the run, for people."""
        self.lines: list[str] = []
        """Lines to print about the last step."""
        self._profile: Profile | None = None
        """Records the memory of the step that is running, if it is measured."""
        self._measured: tuple[int, float] | None = None
        """Number and time of the step whose memory was measured, until another step has been compared with it."""
        self._compiles = compiles

    @contextmanager
    def __call__(self, micro_batches: int, step: int) -> Iterator[None]:
        """The context of one step.

        Args:
            micro_batches: of the step.
            step: its number in the run, which is another one than this process's if the run was resumed.
        """
        self.steps, self.step, self.lines = self.steps + 1, step, []
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
            begin = time.perf_counter()
            yield
            if not self._compiles:
                self._compare(time.perf_counter() - begin)
            self._compiles = False

    def end_phase(self, name: str) -> None:
        """Must be called when a part of a step ends that is not a pass."""
        if self._profile is not None:
            self._profile.end_phase(name)

    def _compare(self, seconds: float) -> None:
        """Compares a step in which nothing is measured with the one whose memory was."""
        if self._measured is not None:
            (step, measured), self._measured = self._measured, None
            self.lines.append(
                f"step {step}, whose memory was measured, took {measured:.2f} s, {measured / seconds:.1f} times as long as "
                f"step {self.step}: {seconds:.2f} s (the first step after a start also connects the ranks)"
            )

    @contextmanager
    def _timeline(self) -> Iterator[None]:
        path, passes = self.folder / f"trace-rank{self.rank}.json.gz", dict[str, Any]()
        with ExitStack() as stack:
            if isinstance(self.model, PipelinedModel):
                passes = stack.enter_context(record_passes(self.model.channels, self.layout.schedule))
            stack.enter_context(record_timeline(path))
            yield
        self.lines = [f"timeline of step {self.step}: {path} (open it in chrome://tracing or https://ui.perfetto.dev)"]
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
        folder = self.folder / "memory"
        with naming(folder):
            folder.mkdir(parents=True, exist_ok=True)
        stages = [chunk.model for chunk in self.model.chunks] if isinstance(self.model, PipelinedModel) else [self.model]
        profile = Profile(stages, self.state, self.axis.masters, self.axis.copies, self.device)
        meter, begin = memory.Meter(self.model, (*self.axis.masters.values(), *self.axis.copies)), time.perf_counter()

        def after_pass(action: Action) -> None:
            meter.read(action)
            profile.end_pass(action)

        history = watch(self.device, folder / f"rank-{self.rank}.pickle")
        with running_uncompiled(), history as usage, meter, profile.recording(usage.before):
            self.schedule.after_pass, self._profile = after_pass, profile
            try:
                yield
            finally:
                self.schedule.after_pass, self._profile = nothing, None
        seconds = time.perf_counter() - begin
        self._measured = self.step, seconds
        peak = self._write_profile(profile, usage, seconds, folder / f"rank-{self.rank}.json")
        measured = meter.memory(self.state, self.axis.copies, formula.after if formula else None)
        self._gather(memory.OfRank(self.rank, formula, measured), peak)

    def _write_profile(self, profile: Profile, usage: Usage, seconds: float, path: Path) -> dict[str, Any]:
        """Writes the profile of this rank. Returns its peak."""
        found, on_gpu = replay(profile), self.device.type == "cuda"
        layout, stage = self.layout, self.layout.weights.coordinate(self.rank)["stage"]
        found["peak"] |= {
            "stages": stages_on(stage, layout.pipeline, layout.chunks, layout.schedule),
            "measured": usage.peak if on_gpu else found["peak"]["total"],
            "measured_by": "torch.cuda.max_memory_allocated" if on_gpu else "living storages",
            "reserved": usage.reserved if on_gpu else None,
            "slack": usage.reserved - usage.peak,
        }
        facts = {
            "format": FORMAT, "rank": self.rank, "world": layout.world, "device": self.device.type,
            "step": self.step, "seconds": round(seconds, 3),
        }  # fmt: skip
        write_json(path, {**facts, **found})
        return found["peak"]

    def _gather(self, mine: memory.OfRank, peak: dict[str, Any]) -> None:
        """Gathers the memory of all ranks, for ``memory.json``, and shows that of the ranks of the first pipeline."""
        ranks: list[Any] = [None] * self.layout.world
        dist.all_gather_object(ranks, (mine, peak))
        self.lines = memory.table([ranks[rank][0] for rank in self.layout.weights.groups("stage")[0]])
        rows = [
            {"formula": of_rank.formula and asdict(of_rank.formula), "measured": asdict(of_rank.measured), "peak": its_peak}
            for of_rank, its_peak in ranks
        ]
        self._write("memory.json", {**rows[0], "ranks": rows})
        peaks = [row["peak"] for row in rows]
        most = max(range(len(peaks)), key=lambda rank: peaks[rank]["measured"])
        self.lines += [
            _describe(most, peaks[most]),
            f"memory of every rank by module: {self.folder / 'memory'} (drawn in report.html)",
        ]

    @contextmanager
    def _collectives(self, micro_batches: int) -> Iterator[None]:
        with running_uncompiled(), collectives.Counter(self.layout) as counter:
            yield
        rows = counter.rows()
        self.lines = collectives.table(rows, self.layout, self.formulas(micro_batches)[1])
        self._write("comm.json", [asdict(row) for row in rows])

    def _write(self, name: str, values: object) -> None:
        if self.rank == 0:
            write_json(self.folder / name, values, indent=1)


def _describe(rank: int, peak: Mapping[str, Any]) -> str:
    """Describes the peak of the rank on which it is highest."""
    parts = ", ".join(f"{name} {peak[kind] / 1e6:.3f}" for kind, (name, _) in KINDS.items() if peak[kind])
    slack = f", slack {peak['slack'] / 1e6:.3f}" if peak["slack"] else ""
    where = f"{peak['phase']}, {peak['module'] or 'no module'}, {peak['operator']}"
    return f"peak, MB: {peak['measured'] / 1e6:.3f} on rank {rank} ({where}): {parts}{slack}"
