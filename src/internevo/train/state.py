"""The counters of a run. With weights, moments and loss scale they are all that a resumed run needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..config.run import LoadCkptInfo
from ..data.batches import Cursor


@dataclass
class RunState:
    """Counters, the same on every rank."""

    cursor: Cursor = field(default_factory=Cursor)
    consumed_tokens: int = 0
    skipped_steps: int = 0
    data_skipped: int = 0
    """Documents (rows of tokenized data) that could not be read and were left out."""

    @property
    def step(self) -> int:
        """Number of the last step done; steps count from 1, batches from 0."""
        return self.cursor.batch

    def to_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {
            "step": self.step,
            "consumed_rows": self.cursor.rows,
            "place": self.cursor.position,
            "consumed_tokens": self.consumed_tokens,
            "skipped_steps": self.skipped_steps,
            "data_skipped": self.data_skipped,
        }

    def load(self, values: dict[str, Any], wanted: LoadCkptInfo) -> None:
        """From a checkpoint: the position in the schedule is the "scheduler", the position in the data the "sampler"."""
        if wanted.has("scheduler"):
            self.cursor.batch = values["step"]
            self.skipped_steps = values["skipped_steps"]
        if wanted.has("sampler"):
            self.cursor.rows = values["consumed_rows"]
            self.cursor.position = values.get("place", self.cursor.rows)  # earlier checkpoints: rows of shuffled data
            self.data_skipped = values.get("data_skipped", 0)
            self.consumed_tokens = values["consumed_tokens"]
