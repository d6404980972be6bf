"""``internevo evaluate``: starts the processes if no launcher has, evaluates, and prints a table or JSON."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..parallel.launcher import read_launcher
from ..storage.jsonfile import to_json
from ..train.config import load_config
from .launch import default_processes, launch

if TYPE_CHECKING:
    from ..train.evaluate import Evaluation, Score


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is evaluated, and how: the options of the command, under their names."""

    model: Path
    data: Path | None = None
    tasks: tuple[str, ...] = ()
    task_folder: Path | None = None
    fewshot: int | None = None
    chat_template: bool = False
    tokenizer: Path | None = None
    seq_len: int | None = None
    stride: int | None = None
    batch_size: int | None = None
    limit: int | None = None
    config: Path | None = None
    overrides: tuple[str, ...] = ()
    json: bool = False

    def arguments(self) -> list[str]:
        """Returns the arguments of the command that asks this."""
        options = []
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in ("model", "overrides") or value is None or value is False or value == ():
                continue
            text = ",".join(value) if isinstance(value, tuple) else str(value)
            options += [f"--{field.name.replace('_', '-')}", *([] if value is True else [text])]
        return ["evaluate", *options, "--", str(self.model), *self.overrides]

    def checked(self) -> dict[str, Any]:
        """Returns the arguments of ``train.evaluate.evaluate`` that can be checked before any process is started."""
        return {
            "tasks": self.tasks, "task_folder": self.task_folder, "tokenizer": self.tokenizer, "seq_len": self.seq_len,
            "stride": self.stride, "batch_size": self.batch_size, "limit": self.limit,
            "config": load_config(self.config) if self.config else None, "overrides": self.overrides,
        }  # fmt: skip

    def check(self, processes: int) -> None:
        """Checks all that is asked, before any process is started."""
        from ..train.evaluate import Asked

        Asked.checked(self.model, self.data, world_size=processes, **self.checked())


def run(question: Question, processes: int | None) -> int:
    """Evaluates, and prints the result on rank 0.

    Args:
        processes: number of processes to start, if no launcher has started this one; None: one per GPU, or 1.

    Returns:
        The exit code.

    Raises:
        UsageError: if nothing is asked, or as ``train.evaluate.evaluate``.
    """
    if question.data is None and not question.tasks:
        raise UsageError("give --data FOLDER, a folder of tokenized data (internevo tokenize makes one), or --tasks NAMES")
    info = read_launcher(os.environ)
    if info.address is None:
        processes = processes or default_processes()
        if processes > 1:
            question.check(processes)
            with tempfile.TemporaryDirectory() as log:
                return launch(question.arguments(), processes, Path(log))
    elif processes not in (None, info.size):
        raise UsageError(f"--nproc {processes}: a launcher has started this process as one of {info.size}: leave out --nproc")
    from ..train.evaluate import evaluate

    found = evaluate(
        question.model, question.data, fewshot=question.fewshot, chat=question.chat_template, launcher=info,
        **question.checked(),
    )  # fmt: skip
    if info.rank == 0:
        for note in found.notes:
            print(f"note: {note}", file=sys.stderr)
        print(to_json(found.to_dict(), indent=1) if question.json else "\n".join(table(found)), flush=True)
    return 0


def table(found: Evaluation) -> Iterator[str]:
    """Yields the lines of tables: a row for each dataset type, and one for all; and a row for each metric of a task."""
    if found.data is not None:
        yield f"{found.model} on {found.data}, contexts of up to {found.seq_len:,} tokens"
        yield f"{'type':<16} {'documents':>10} {'tokens':>14} {'loss':>9} {'perplexity':>12} {'bits/byte':>10}"
        for name, score in {**found.by_type, **({"all": found.total} if len(found.by_type) != 1 else {})}.items():
            yield f"{name:<16} {_row(score)}"
    if found.tasks:
        yield f"{found.model}, tasks of lm-eval"
        yield f"{'task':<32} {'metric':<24} {'value':>9} {'stderr':>9}"
    for task, values in found.tasks.items():
        for metric, value in values.items():
            if "_stderr" not in metric:
                error = values.get(stderr_of(metric))
                yield f"{task:<32} {metric:<24} {value:>9.4f} {'-' if error is None else f'{error:.4f}':>9}"


def stderr_of(metric: str) -> str:
    """Returns the name of a metric's standard error: that of "acc (strict)" is "acc_stderr (strict)"."""
    name, space, rest = metric.partition(" ")
    return f"{name}_stderr{space}{rest}"


def _row(score: Score) -> str:
    bits = "-" if score.bits_per_byte is None else f"{score.bits_per_byte:.4f}"
    return f"{score.documents:>10,} {score.tokens:>14,} {score.loss:>9.4f} {score.perplexity:>12.4f} {bits:>10}"
