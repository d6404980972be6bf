"""What a GPU's own allocator says about the memory of a step, and its history, for https://docs.pytorch.org/memory_viz."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from ..storage.naming import naming


@dataclass
class Usage:
    """What PyTorch's allocator for a GPU has counted. All are 0 on a CPU, whose allocator counts nothing."""

    before: int = 0
    """Bytes allocated at the start."""
    peak: int = 0
    """The most bytes that were allocated."""
    reserved: int = 0
    """The most bytes that were reserved: those allocated, and the slack."""


@contextmanager
def watch(device: torch.device, history: Path) -> Iterator[Usage]:
    """Counts in this context.

    Args:
        history: on a GPU, the file to which all allocations are written, with the Python code that made them.

    Yields:
        What is filled in at the end.
    """
    usage = Usage()
    if device.type != "cuda":
        yield usage
        return
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    usage.before = torch.cuda.memory_allocated(device)
    torch.cuda.memory._record_memory_history(stacks="python")
    try:
        yield usage
        torch.cuda.synchronize(device)
        usage.peak, usage.reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        with naming(history):
            torch.cuda.memory._dump_snapshot(str(history))
    finally:
        torch.cuda.memory._record_memory_history(None)
