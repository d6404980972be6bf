"""What every rank tells all others with each step, on the way with the losses."""

from __future__ import annotations

from dataclasses import astuple, dataclass


@dataclass
class Shared:
    """One rank's numbers; or, after the step, their sums over all ranks."""

    stop_asked: float
    """1 on a rank that was asked to stop by a signal."""
    stop_at: float
    """Number in the stop file, which rank 0 reads; 0 on the others."""
    data_skipped: float
    """Documents (rows of tokenized data) that a rank has left out since the step before."""
    memory_peak: list[float]
    """Bytes, by rank: each rank fills in its own."""

    def pack(self) -> list[float]:
        """As one list of numbers, to be added up."""
        *numbers, memory_peak = astuple(self)
        return [*numbers, *memory_peak]

    @classmethod
    def unpack(cls, values: list[float]) -> Shared:
        """The inverse of ``pack``."""
        stop_asked, stop_at, data_skipped, *memory_peak = values
        return cls(stop_asked, stop_at, data_skipped, memory_peak)
