"""What is due after a step besides a checkpoint, and what of it a process that has ended has left over."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import Config
from ..observe.metrics import usable_rows
from ..storage.jsonfile import to_json

if TYPE_CHECKING:
    from ..parallel.world import World


def is_due(step: int, every: int, last: bool) -> bool:
    """Whether what is done every ``every`` steps (0: only after the last) is done after ``step``."""
    return last or (every > 0 and step % every == 0)


@dataclass(frozen=True)
class Due:
    """What is to be done after a step."""

    valid: bool = False
    """Evaluate on the validation data."""
    prompts: tuple[str, ...] = ()
    """Take samples after these prompts."""
    tasks: bool = False
    """Evaluate on tasks."""

    @classmethod
    def after(cls, config: Config, step: int, last: bool) -> Due:
        """Returns what is due after ``step``. ``last``: whether it is the last step of the run."""
        data, monitor = config.data, config.monitor
        train_folder, valid_folder = data.folders
        has_valid = bool(data.valid_every) and (valid_folder is not None or (train_folder is None and not data.mixture))
        return cls(
            has_valid and is_due(step, data.valid_every, last),
            monitor.sample_prompts if is_due(step, monitor.sample_every, last) else (),
            bool(monitor.tasks) and is_due(step, monitor.evaluate_every, last),
        )

    @classmethod
    def left_over(cls, config: Config, step: int, last: int) -> Due:
        """Returns what is due after ``step`` and not in the run folder, because a process of the run was stopped or killed
        before it came to that. If another run has trained that step, nothing is.

        Args:
            step: the last step that was trained.
            last: the last step of the run. If it is before ``step``, the config is not the one that the run goes on with, and
                nothing is left over.
        """
        due, run = cls.after(config, step, step == last), config.run_folder
        if step > last or not due:
            return cls()
        rows = _rows(run / "metrics.jsonl", step)
        if not any("loss" in row for row in rows):
            return cls()
        sampled = {row.get("prompt") for row in _rows(run / "samples.jsonl", step)}
        return cls(
            due.valid and not any("valid_loss" in row for row in rows),
            tuple(prompt for prompt in due.prompts if prompt not in sampled),
            due.tasks and not any("tasks" in row for row in rows),
        )

    @classmethod
    def left_over_on_all(cls, config: Config, world: World, step: int, last: int) -> Due:
        """Returns the same on every rank: what rank 0 finds in the run folder. Every rank must call it."""
        if world.rank == 0:
            world.store.set("left over", to_json(asdict(cls.left_over(config, step, last))))
        values = json.loads(world.store.get("left over"))
        return cls(values["valid"], tuple(values["prompts"]), values["tasks"])

    def __bool__(self) -> bool:
        return self.valid or bool(self.prompts) or self.tasks

    def __str__(self) -> str:
        parts = {"the evaluation": self.valid, "samples": self.prompts, "the evaluation on tasks": self.tasks}
        return ", ".join(name for name, due in parts.items() if due)


def _rows(path: Path, step: int) -> list[dict[str, object]]:
    return [row for row in usable_rows(path, {})[0] if row["step"] == step]
