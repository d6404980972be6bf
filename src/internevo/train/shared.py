"""Numbers that every rank shares with all others in each step, in the same all-reduce as the losses."""

from __future__ import annotations

from dataclasses import astuple, dataclass


@dataclass
class Shared:
    """The numbers of one rank, and after the all-reduce their sums over all ranks."""

    stop_asked: float
    """1 on a rank that a signal has asked to stop, otherwise 0."""
    launcher_ended: float
    """1 on a rank whose launcher has ended, otherwise 0."""
    stop_at: float
    """Number in the stop file, which rank 0 reads; 0 on the other ranks."""
    data_skipped: float
    """Documents (or rows of tokenized data) that the rank has left out since the previous step."""
    memory_peak: list[float]
    """Bytes, one number per rank. Each rank fills in its own number; the others are 0."""

    def pack(self) -> list[float]:
        """Returns all numbers as one list."""
        *numbers, memory_peak = astuple(self)
        return [*numbers, *memory_peak]

    @classmethod
    def unpack(cls, values: list[float]) -> Shared:
        """Makes a ``Shared`` from what ``pack`` returns."""
        stop_asked, launcher_ended, stop_at, data_skipped, *memory_peak = values
        return cls(stop_asked, launcher_ended, stop_at, data_skipped, memory_peak)
