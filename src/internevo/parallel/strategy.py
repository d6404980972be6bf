"""What strategies have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch.distributed as dist


@dataclass
class Collectives:
    """Collectives of one kind over groups of one axis."""

    kind: str
    axis: str
    """As in ``Layout.groups``, or "world"."""
    count: int = 0
    nbytes: int = 0
    seconds: float = 0.0
    """Each waited for by itself, with nothing to hide behind."""

    def wire(self, ranks: int) -> float:
        """Bytes that a rank sends, in a group of ``ranks``."""
        return self.nbytes * (ranks - 1) / ranks * (2 if self.kind == "all-reduce" else 1)


@dataclass(frozen=True)
class Inner:
    """What a strategy inside a layer tells the data axis."""

    partial: Mapping[str, dist.ProcessGroup] = field(default_factory=dict)
    """Parameters that several inner ranks hold, and the group over which their gradients must still be summed."""
    strategy: CutsSequences | None = None


class CutsSequences(Protocol):
    """A strategy that may cut sequences."""

    cut: bool
