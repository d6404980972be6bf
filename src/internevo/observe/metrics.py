"""metrics.jsonl, samples.jsonl and TensorBoard. Every step is in them once, even after a run has been resumed."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any

from ..storage.jsonfile import to_json
from ..storage.naming import naming
from .record import StepRecord, TaskRecord, ValidRecord


class JsonLines:
    """A file of rows, one JSON object per line. It is continued after a step.

    Rows of later steps, which the run writes again, and damaged lines move to NAME.removed, which nobody ever shortens.
    """

    def __init__(self, path: Path, last_step: int) -> None:
        """``last_step``: the last step whose rows are kept, if the file exists."""
        self.path = path
        kept, removed = list[str](), list[bytes]()
        for line, row in _lines(path):
            if row is not None and row["step"] <= last_step:
                kept.append(to_json(row) + "\n")  # strict JSON, which older versions did not write
            else:
                removed.append(line + b"\n")
        if removed:
            history = path.with_name(path.name + ".removed")
            with naming(history), open(history, "ab") as file:
                file.writelines(removed)
                file.flush()
                os.fsync(file.fileno())
        temporary = path.with_name(path.name + ".tmp")
        with naming(temporary):
            temporary.write_text("".join(kept), encoding="utf-8")
        os.replace(temporary, path)
        self._file = open(path, "a", encoding="utf-8", buffering=1)

    def write(self, row: dict[str, Any]) -> None:
        """Appends a row. It is in the file when this method returns."""
        with naming(self.path):
            self._file.write(to_json(row) + "\n")

    def close(self) -> None:
        """Closes the file."""
        with naming(self.path):
            self._file.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Reads the rows of a file. Lines that are not rows are left out: damaged ones, which a killed process may have left, and
    those without a step. No file: no rows."""
    return [row for _, row in _lines(path) if row is not None]


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Yields each line of a file without its end, and the row in it, if it is one."""
    if not path.is_file():
        return
    with open(path, "rb") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            step = row.get("step") if isinstance(row, dict) else None
            yield line.rstrip(b"\r\n"), row if isinstance(step, int) and not isinstance(step, bool) else None


def usable_rows(path: Path, kinds: dict[str, type | UnionType]) -> tuple[list[dict[str, Any]], int]:
    """Reads the rows that have the keys in ``kinds``, with values of these types. No file: no rows.

    Returns:
        The rows, and the number of lines that are damaged: not JSON, or not an object.
    """
    lines = path.read_bytes().splitlines() if path.is_file() else []
    rows = []
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            rows.append(json.loads(line))
    objects = [row for row in rows if isinstance(row, dict)]
    usable = [row for row in objects if all(isinstance(row.get(key, ...), kind) for key, kind in kinds.items())]
    return usable, len(lines) - len(objects)


class TensorBoardLog:
    """Writes scalars for TensorBoard."""

    def __init__(self, folder: Path, last_step: int, queue: int) -> None:
        """
        Args:
            last_step: TensorBoard hides what was written for later steps.
            queue: number of events in memory before they are written.
        """
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder
        self._writer: Any = SummaryWriter(str(folder), purge_step=last_step + 1, max_queue=queue)

    def step(self, record: StepRecord) -> None:
        """Writes the scalars of a training step."""
        scalars = {
            "train/loss": record.loss, "train/grad_norm": record.grad_norm, "train/lr": record.lr,
            "speed/tgs": record.tgs, "speed/tflops": record.tflops, "speed/step_time": record.step_time,
            "speed/data_time": record.data_time, "memory/peak_max": record.memory_peak_max,
            **{f"train/loss/{name}": loss for name, loss in record.loss_by_type.items()},
        }  # fmt: skip
        for name, value in (record.moe or {}).items():
            if not isinstance(value, list):
                scalars[f"moe/{name}"] = value
        with naming(self.folder):
            for name, value in scalars.items():
                self._writer.add_scalar(name, value, record.step)

    def valid(self, record: ValidRecord) -> None:
        """Writes the scalars of an evaluation."""
        with naming(self.folder):
            self._writer.add_scalar("valid/loss", record.valid_loss, record.step)
            self._writer.add_scalar("valid/ppl", record.valid_ppl, record.step)
            for name, loss in record.valid_loss_by_type.items():
                self._writer.add_scalar(f"valid/loss/{name}", loss, record.step)

    def tasks(self, record: TaskRecord) -> None:
        """Writes the scalars of an evaluation on tasks."""
        with naming(self.folder):
            for name, value in record.values().items():
                self._writer.add_scalar(f"tasks/{name}", value, record.step)

    def close(self) -> None:
        """Writes what is still in memory, and closes the file."""
        with naming(self.folder):
            self._writer.close()
