"""A dry run: one rank of a pretended world builds its part of the model and takes a step, without memory and without computing.

The strategies, the schedule and the optimizer are those of a real run; only the other ranks, the values of tensors and the data
are left out. Each micro-batch has rows of one document. The rows of experts are balanced: every rank sends as many to each rank
of the expert axis, or one more. Of many micro-batches, only as many are run as differ (``parallel.repeats``).
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, groupby
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from ..config import Config
from ..config.data import Data
from ..config.write import obstacle
from ..data.batches import Cursor, MicroBatch, StepBatch, TrainBatches
from ..data.rows import RandomRows
from ..data.source import ShuffledRows
from ..errors import UsageError
from ..measure import peak as measure
from ..measure.collectives import Counter
from ..measure.memory import Meter
from ..models.moe import MoE
from ..parallel import plan
from ..parallel.layout import Layout
from ..parallel.memory import Memory
from ..parallel.orders import Action, orders
from ..parallel.pretended import NoMemory, pretend
from ..parallel.repeats import shortened
from ..parallel.schedule import nothing
from ..parallel.strategy import Collectives, Workload, added_up
from ..storage.jsonfile import read_object, write_json
from ..train.folder import DRY_RUN, OTHER_FOLDER
from ..train.parts import Parts
from ..train.process import prepare
from ..train.shared import Shared
from ..train.step import Stepper, formulas
from ..wording import counted
from .job import dataset_types
from .memory import temporary

FORMAT = "dry run 1"
"""Says in ``dryrun.json`` what it is, with the version of its format."""


class Pass(NamedTuple):
    """A pass of a step, with its collectives in their order."""

    action: Action
    calls: list[Collectives]


@dataclass(frozen=True)
class Peak:
    """The moment at which the rank has the most in memory."""

    nbytes: int
    """Master weights, moments, and everything else that is alive."""
    during: Action | None
    """The pass; None: after the passes, in the update of the weights."""
    module: str
    """The innermost module in whose forward pass (or recomputation) it is; empty: in no one's."""
    operator: str
    """The operator that has made the last tensor."""
    made: int
    """The bytes of that tensor."""

    def where(self) -> str:
        """Says when and where it is, to print."""
        kind, stage, number = self.during or ("", 0, 0)
        when = f"pass {kind} of stage {stage}, micro-batch {number}" if self.during else "the update of the weights"
        return f"in {when}, at {self.operator} ({self.made:,} bytes{self.module and ', '}{self.module})"


@dataclass(frozen=True)
class DryRun:
    """What one rank of a run has in memory and sends, counted in a dry run and by formula."""

    rank: int
    world: int
    coordinate: dict[str, int]
    """Axis of the layout -> the position of the rank."""
    micro_batches: int
    """Of a step."""
    parameters: int
    """Number of parameters of the whole model."""
    memory: Memory
    peak: Peak
    passes: list[Pass]
    update: list[Collectives]
    """The collectives after the last pass, in their order."""
    stated_memory: Memory | None
    """By formula; None with adapters."""
    stated_peak: int | None
    """The bytes of the peak by formula."""
    stated_collectives: list[Collectives] | None
    sizes: dict[str, int]
    """Axis of a collective -> the number of ranks of a group."""
    balanced: bool
    """Whether rows travel to experts: the counted bytes of all-to-alls are then those of balanced rows."""
    data: dict[str, Any]
    """Which rows the rank reads (``data_plan``)."""
    seconds: float

    @property
    def collectives(self) -> list[Collectives]:
        """All collectives, added up."""
        return added_up([*chain(*(calls for _, calls in self.passes)), *self.update])

    def to_dict(self) -> dict[str, Any]:
        """Returns the content of ``dryrun.json``."""
        counted, stated = _by_group(self.collectives), _by_group(self.stated_collectives or [])
        rows = [
            {
                "kind": kind,
                "group": axis,
                "ranks": self.sizes[axis],
                "counted": counted[kind, axis],
                "formula": stated[kind, axis],
            }
            for kind, axis in sorted({*counted, *stated})
        ]
        memory = {"counted": asdict(self.memory), "formula": self.stated_memory and asdict(self.stated_memory)}
        names = ("rank", "world", "coordinate", "micro_batches", "parameters", "seconds", "data")
        return {"format": FORMAT, **{name: getattr(self, name) for name in names}, "balanced_rows": self.balanced,
                "memory": memory, "peak": {**asdict(self.peak), "formula": self.stated_peak}, "collectives": rows,
                **self._in_order()}  # fmt: skip

    def _in_order(self) -> dict[str, Any]:
        """Returns the passes with their collectives in their order. Passes with the same ones share a list."""
        lists = list[list[list[Any]]]()
        passes = []
        for action, calls in [*self.passes, (None, self.update)]:
            found = _repeated(calls)
            if found not in lists:
                lists.append(found)
            passes.append([*(action or ("update", None, None)), lists.index(found)])
        return {"calls": lists, "passes": passes}

    def lines(self) -> list[str]:
        """Returns the tables to print."""
        place = ", ".join(f"{axis} {number}" for axis, number in self.coordinate.items())
        number = counted(self.micro_batches, "micro-batch")
        lines = [
            f"rank {self.rank} of {self.world} ({place}): a step of {number}, without computing ({self.seconds:.1f} s)",
            f"{'memory, bytes':32}{'counted':>20}{'by formula':>20}",
        ]
        for part, name in {**Memory.NAMES, "total": "total"}.items():
            stated = f"{getattr(self.stated_memory, part):,}" if self.stated_memory else "-"
            lines.append(f"{name:32}{getattr(self.memory, part):>20,}{stated:>20}")
        stated = f"{self.stated_peak:,}" if self.stated_peak else "-"
        lines.append(f"{'most, within passes too':32}{self.peak.nbytes:>20,}{stated:>20}  {self.peak.where()}")
        lines.append(f"{'collective':16}{'group':>16}{'ranks':>7}{'count':>9}{'bytes':>22}  by formula")
        for row in self.to_dict()["collectives"]:
            count, nbytes = row["counted"]["count"], row["counted"]["nbytes"]
            same = "the same" if row["counted"] == row["formula"] else "{count:,}: {nbytes:,}".format(**row["formula"])
            stated = same if self.stated_collectives is not None else "-"
            lines.append(f"{row['kind']:16}{row['group']:>16}{row['ranks']:>7}{count:>9,}{nbytes:>22,}  {stated}")
        if self.balanced:
            lines.append("balanced experts: each rank gets as many rows; in a run, the bytes of all-to-alls and of activations "
                         "depend on the router")  # fmt: skip
        return lines

    def write(self, folder: Path) -> Path:
        """Writes ``dryrun.json`` to a run folder. Returns its path."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"the run folder {folder} cannot be made: {error.strerror}; {OTHER_FOLDER}") from error
        write_json(folder / DRY_RUN, self.to_dict(), indent=1)
        return folder / DRY_RUN


def _repeated(calls: Sequence[Collectives]) -> list[list[Any]]:
    """Returns [kind, group, bytes, how many one after the other] for collectives."""
    return [[*key, len(list(same))] for key, same in groupby(calls, key=lambda call: (call.kind, call.axis, call.nbytes))]


def _by_group(rows: Sequence[Collectives]) -> defaultdict[tuple[str, str], dict[str, int]]:
    """Returns (kind, axis) -> count and bytes; 0 for others."""
    found = {(row.kind, row.axis): {"count": row.count, "nbytes": row.nbytes} for row in rows}
    return defaultdict(lambda: {"count": 0, "nbytes": 0}, found)


def check_file(folder: Path) -> None:
    """Checks that a dry run may write to a run folder.

    Raises:
        UsageError: if its ``dryrun.json`` is not one that a dry run has written, or nothing can be written there.
    """
    path = folder / DRY_RUN
    if reason := obstacle(folder):
        raise UsageError(f"the run folder {folder} cannot be used: {reason}; {OTHER_FOLDER}")
    if os.path.lexists(path) and not path.is_file():
        raise UsageError(f"{path} is not a file, and is not replaced: {OTHER_FOLDER}")
    if path.exists() and not str(read_object(path).get("format")).startswith("dry run"):
        raise UsageError(f"{path} is not from a dry run, and is not replaced: {OTHER_FOLDER}")


def dry_run(config: Config, world_size: int, rank: int, whole: bool = False) -> DryRun:
    """Takes one step of a rank without computing.

    The config must be one that can be trained on ``world_size`` processes.

    Args:
        whole: run all micro-batches, also those that only repeat what others do.
    """
    begin = time.perf_counter()
    config = config.model_copy(update={"model": config.model.model_copy(update={"compile": False})})
    with pretend(rank, world_size) as world:
        prepare(config, world.device)
        no_memory, layout = NoMemory(), Layout.from_config(config, world_size)
        with no_memory.building():
            parts = Parts.without_weights(config, world, layout, _source(config.data), None)
        balanced = _balance_rows(parts)
        stepper, count = Stepper(parts), parts.sizes.micro_batches(config.data.total_steps - 1)
        run, examples = _examples(layout, rank, count, whole)
        with no_memory.running():
            batch = _batch(parts, run)
        step = _Step(parts, no_memory)
        with no_memory.remembering(), step.measured(), no_memory.running():
            stepper.enqueue(batch, config.adam.lr, config.adam.adam_beta2, partial(_shared, world_size))
        stated_memory, stated = formulas(parts, count)
        memory, peak = step.memory(examples, stated_memory.after if stated_memory else None)
        stated_peak = None
        if stated_memory is not None:
            work = Workload.from_config(parts.decoder, config, layout, count, rank=rank)
            stated_peak = stated_memory.total + temporary(work, plan.memory(work))
        passes = [Pass(action, step.passes[example]) for action, example in examples.items()]
        return DryRun(
            rank, world_size, layout.weights.coordinate(rank), count, parts.decoder.parameters(), memory, peak, passes,
            step.update, stated_memory, stated_peak, stated, _sizes(layout), balanced, data_plan(parts),
            time.perf_counter() - begin,
        )  # fmt: skip


def _examples(layout: Layout, rank: int, count: int, whole: bool) -> tuple[int, dict[Action, Action]]:
    """Returns how many micro-batches to run, and for each pass of a step of ``count`` the one of these that does the same."""
    mode, place = layout.schedule if layout.pipeline > 1 else "1F1B", layout.weights.coordinate(rank)["stage"]
    on = [layout.rank_of_stage(stage) for stage in range(layout.stages)]
    if whole:
        return count, {action: action for action in orders(mode, layout.pipeline, layout.chunks, count)[place]}
    return shortened(mode, layout.pipeline, layout.chunks, count, place, on)


class _Step:
    """What is counted and measured in the step that is run."""

    def __init__(self, parts: Parts, no_memory: NoMemory) -> None:
        masters = (*parts.axis.masters.values(), *parts.axis.copies)
        self.parts, self.counter = parts, Counter(parts.layout)
        self.meter, self.peak = Meter(parts.model, masters), measure.Peak(parts.model, masters, no_memory.mode)
        self.passes, self._counted = dict[Action, list[Collectives]](), 0

    @contextmanager
    def measured(self) -> Iterator[None]:
        """The context of the step."""
        self.parts.schedule.after_pass = self._after_pass
        with self.counter, self.meter, self.peak:
            yield
        self.parts.schedule.after_pass = nothing

    def _after_pass(self, action: Action) -> None:
        self.meter.read(action)
        self.peak.after_pass(action)
        self.passes[action], self._counted = self.counter.calls[self._counted :], len(self.counter.calls)

    @property
    def update(self) -> list[Collectives]:
        """The collectives after the last pass."""
        return self.counter.calls[self._counted :]

    def memory(self, examples: Mapping[Action, Action], after: Action | None) -> tuple[Memory, Peak]:
        """Returns the memory after a pass of the whole step (None: the last one that leaves the most), and the peak."""
        readings, moments = self.meter.readings, self.peak.moments
        self.meter.readings = {action: readings[example] for action, example in examples.items()}
        memory = self.meter.memory(self.parts.tensors(), self.parts.axis.copies, after)
        before = memory.total - sum(self.meter.readings[memory.after])
        of_run = dict(zip(readings, moments, strict=False))
        found = [(action, of_run[example]) for action, example in examples.items()]
        during, most = max([*found, (None, moments[-1])], key=lambda pair: pair[1].nbytes)
        return memory, Peak(before + most.nbytes, during, most.module, most.operator, most.made)


def data_plan(parts: Parts) -> dict[str, Any]:
    """Returns which rows of a global batch the rank reads, in the order of its micro-batches, and how many there are."""
    data, layout = parts.config.data, parts.layout
    rank = layout.activations.coordinate(parts.world.rank)["data"]
    batches = TrainBatches(parts.source, parts.sizes, rank, data.use_packed_dataset, data.total_steps)
    last = data.total_steps - 1
    return {
        "data_rank": rank, "data_ranks": layout.data, "rows_per_micro_batch": data.micro_bsz, "tokens_per_row": data.seq_len,
        "rows_per_step": parts.sizes.rows(last), "rows_of_the_first_step": batches.rank_rows(0),
    }  # fmt: skip


def _source(data: Data) -> ShuffledRows:
    """Returns a source of random rows, with as many dataset types as the data has, as far as it is here."""
    rows = RandomRows(data.seq_len, 2, data.seed)
    rows.types = dataset_types(data) or rows.types
    return ShuffledRows(rows, data.seed)


def _batch(parts: Parts, count: int) -> StepBatch:
    """Returns micro-batches of the last step, with one document in each row."""
    data, sizes, last = parts.config.data, parts.sizes, parts.config.data.total_steps - 1
    rows, size = data.micro_bsz, data.seq_len
    shape = (1, rows * size) if data.use_packed_dataset else (rows, size)
    # Borders of documents exist, since the host reads them.
    borders = torch.from_numpy(np.arange(0, (rows + 1) * size, size, dtype=np.int32)) if data.use_packed_dataset else None

    def micro_batch() -> MicroBatch:
        tokens, labels = (torch.zeros(shape, dtype=torch.int64) for _ in range(2))
        return MicroBatch(tokens, labels, torch.zeros(shape, dtype=torch.int16), borders)

    return StepBatch([micro_batch() for _ in range(count)], last, Cursor(), sizes.rows(last) * size)


def _sizes(layout: Layout) -> dict[str, int]:
    return {"world": layout.world, **layout.sizes()}


def _shared(world_size: int) -> Shared:
    return Shared(0.0, 0.0, 0.0, 0.0, [0.0] * world_size)


def _balance_rows(parts: Parts) -> bool:
    """Makes as many rows travel to each rank of the expert axis, if experts are over ranks. Returns whether they are."""
    if parts.layout.expert == 1:
        return False
    rank = parts.layout.experts.coordinate(parts.world.rank)["expert"]
    for _, layer in parts.model.numbered_layers():
        if isinstance(layer.mlp, MoE):
            layer.mlp.run_experts = partial(cast(Any, layer.mlp.run_experts), row_counts=partial(balanced_rows, rank))
    return True


def balanced_rows(rank: int, rows: int, sent_nE: Tensor, received_nE: Tensor) -> tuple[list[int], list[int]]:
    """Returns how many rows a rank sends to each rank, and how many it gets from each: the same number, or one more.

    Args:
        rank: its position along the expert axis.
    """
    ranks = len(sent_nE)
    each, rest = divmod(rows, ranks)
    sent, received = ([each + (sign * (other - rank) % ranks < rest) for other in range(ranks)] for sign in (1, -1))
    return sent, received
