"""A dry run: one rank of a pretended world builds its part of the model and takes a step, without memory and without computing.

The strategies, the schedule and the optimizer are those of a real run; only the other ranks, the values of tensors and the data
are left out. Each micro-batch has rows of one document. The rows of experts are balanced: every rank sends as many to each rank
of the expert axis, or one more.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ..config import Config
from ..config.data import Data, name_of
from ..data.batches import Cursor, MicroBatch, StepBatch
from ..data.rows import RandomRows
from ..data.source import ShuffledRows
from ..data.tokenized.index import dataset_type
from ..errors import UsageError
from ..measure.collectives import Counter
from ..measure.memory import Meter
from ..models.moe import MoE
from ..parallel.layout import Layout
from ..parallel.memory import Memory
from ..parallel.pretended import NoMemory, pretend
from ..parallel.schedule import nothing
from ..parallel.strategy import Collectives
from ..storage.jsonfile import read_object, write_json
from ..storage.naming import naming
from ..train.folder import DRY_RUN
from ..train.parts import Parts
from ..train.process import prepare
from ..train.shared import Shared
from ..train.step import Stepper, formulas

FORMAT = "dry run 1"
"""Says in ``dryrun.json`` what it is, with the version of its format."""


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
    collectives: list[Collectives]
    stated_memory: Memory | None
    """By formula; None with adapters."""
    stated_collectives: list[Collectives] | None
    sizes: dict[str, int]
    """Axis of a collective -> the number of ranks of a group."""
    balanced: bool
    """Whether rows travel to experts: the counted bytes of all-to-alls are then those of balanced rows."""
    seconds: float

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
        names = ("rank", "world", "coordinate", "micro_batches", "parameters", "seconds")
        return {"format": FORMAT, **{name: getattr(self, name) for name in names}, "balanced_rows": self.balanced,
                "memory": memory, "collectives": rows}  # fmt: skip

    def lines(self) -> list[str]:
        """Returns the tables to print."""
        place = ", ".join(f"{axis} {number}" for axis, number in self.coordinate.items())
        lines = [
            f"rank {self.rank} of {self.world} ({place}): a step of {self.micro_batches} micro-batches, without computing "
            f"({self.seconds:.1f} s)",
            f"{'memory, bytes':32}{'counted':>20}{'by formula':>20}",
        ]
        for part, name in {**Memory.NAMES, "total": "total"}.items():
            stated = f"{getattr(self.stated_memory, part):,}" if self.stated_memory else "-"
            lines.append(f"{name:32}{getattr(self.memory, part):>20,}{stated:>20}")
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
        with naming(folder):
            folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / DRY_RUN, self.to_dict(), indent=1)
        return folder / DRY_RUN


def _by_group(rows: Sequence[Collectives]) -> defaultdict[tuple[str, str], dict[str, int]]:
    """Returns (kind, axis) -> count and bytes; 0 for others."""
    found = {(row.kind, row.axis): {"count": row.count, "nbytes": row.nbytes} for row in rows}
    return defaultdict(lambda: {"count": 0, "nbytes": 0}, found)


def check_file(folder: Path) -> None:
    """Checks that a dry run may write to a run folder.

    Raises:
        UsageError: if its ``dryrun.json`` is not one that a dry run has written.
    """
    path = folder / DRY_RUN
    if path.exists() and not str(read_object(path).get("format")).startswith("dry run"):
        raise UsageError(f"{path} is not from a dry run, and is not replaced: choose another folder (ckpt.save_ckpt_folder)")


def dry_run(config: Config, world_size: int, rank: int) -> DryRun:
    """Takes one step of a rank without computing.

    The config must be one that can be trained on ``world_size`` processes.
    """
    begin = time.perf_counter()
    config = config.model_copy(update={"model": config.model.model_copy(update={"compile": False})})
    with pretend(rank, world_size) as world:
        prepare(config, world.device)
        no_memory, layout = NoMemory(), Layout.from_config(config, world_size)
        with no_memory.building():
            parts = Parts.without_weights(config, world, layout, _source(config.data), None)
        balanced = _balance_rows(parts)
        stepper = Stepper(parts)
        with no_memory.running():
            batch = _batch(parts)
        meter = Meter(parts.model, (*parts.axis.masters.values(), *parts.axis.copies))
        parts.schedule.after_pass = meter.read
        with Counter(layout) as counter, meter, no_memory.running():
            stepper.enqueue(batch, config.adam.lr, config.adam.adam_beta2, partial(_shared, world_size))
        parts.schedule.after_pass = nothing
        count = len(batch.micro_batches)
        stated_memory, stated = formulas(parts, count)
        memory = meter.memory(parts.tensors(), parts.axis.copies, stated_memory.after if stated_memory else None)
        return DryRun(
            rank, world_size, layout.weights.coordinate(rank), count, parts.decoder.parameters(), memory, counter.rows(),
            stated_memory, stated, _sizes(layout), balanced, time.perf_counter() - begin,
        )  # fmt: skip


def _source(data: Data) -> ShuffledRows:
    """Returns a source of random rows, with as many dataset types as the data has, as far as it is here."""
    rows = RandomRows(data.seq_len, 2, data.seed)
    folder = Path(data.folders[0] or "")
    if data.mixture:
        rows.types = [name_of(part) for part in data.mixture]
    elif data.folders[0] and (files := [path.relative_to(folder) for path in folder.rglob("*.bin")]):
        rows.types = sorted({dataset_type(folder, str(path)) for path in files})
    return ShuffledRows(rows, data.seed)


def _batch(parts: Parts) -> StepBatch:
    """Returns the micro-batches of the last step, with one document in each row."""
    data, sizes, last = parts.config.data, parts.sizes, parts.config.data.total_steps - 1
    rows, size = data.micro_bsz, data.seq_len
    shape = (1, rows * size) if data.use_packed_dataset else (rows, size)
    # Borders of documents exist, since the host reads them.
    borders = torch.from_numpy(np.arange(0, (rows + 1) * size, size, dtype=np.int32)) if data.use_packed_dataset else None

    def micro_batch() -> MicroBatch:
        tokens, labels = (torch.zeros(shape, dtype=torch.int64) for _ in range(2))
        return MicroBatch(tokens, labels, torch.zeros(shape, dtype=torch.int16), borders)

    return StepBatch([micro_batch() for _ in range(sizes.micro_batches(last))], last, Cursor(), sizes.rows(last) * size)


def _sizes(layout: Layout) -> dict[str, int]:
    return {"world": layout.world, **{axis: len(groups[0]) for axis, groups in layout.groups().items()}}


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
