"""The counters of a run. A resumed run needs them, the weights, the moments and the loss scale, and nothing else."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Any

from ..config.run import LoadCkptInfo
from ..data.batches import Cursor


@dataclass
class RunState:
    """The identity of a run, and its counters, which are the same on every rank."""

    run: str = field(default_factory=lambda: secrets.token_hex(8))
    """The identity of the run: a random text, which all its checkpoints have. That of rank 0 counts."""

    cursor: Cursor = field(default_factory=Cursor)
    """The position in the data."""
    consumed_tokens: int = 0
    skipped_steps: int = 0
    """Steps without an update, because their gradients were not finite."""
    skipped_in_a_row: int = 0
    """The last steps, if they were skipped and a smaller loss scale would not have helped."""
    data_skipped: int = 0
    """Documents (or rows of tokenized data) that were left out because they could not be read."""

    @property
    def step(self) -> int:
        """The number of the last finished step. Steps are numbered from 1, batches from 0."""
        return self.cursor.batch

    def to_dict(self) -> dict[str, Any]:
        """Returns the counters for a checkpoint."""
        return {
            "run": self.run,
            "step": self.step,
            "consumed_rows": self.cursor.rows,
            "place": self.cursor.position,
            "consumed_tokens": self.consumed_tokens,
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": self.skipped_in_a_row,
            "data_skipped": self.data_skipped,
        }

    def load(self, values: dict[str, Any], wanted: LoadCkptInfo) -> None:
        """Restores from a checkpoint what ``wanted`` names: "scheduler" is the step, "sampler" is the position in the data."""
        if wanted.has("scheduler"):
            self.cursor.batch = values["step"]
            self.skipped_steps = values["skipped_steps"]
            self.skipped_in_a_row = values.get("skipped_in_a_row", 0)
        if wanted.has("sampler"):
            self.cursor.rows = values["consumed_rows"]
            # Older checkpoints have no "place": their data was always shuffled, and its position is the number of rows.
            self.cursor.position = values.get("place", self.cursor.rows)
            self.data_skipped = values.get("data_skipped", 0)
            self.consumed_tokens = values["consumed_tokens"]
