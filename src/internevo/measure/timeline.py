"""A timeline of a step, for chrome://tracing or https://ui.perfetto.dev."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


@contextmanager
def record_timeline(path: Path) -> Iterator[None]:
    """Writes what happens within it to ``path`` (.json.gz): operators on the CPU, kernels on the GPU."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=activities) as profiler:
        yield
    profiler.export_chrome_trace(str(path))
