"""Records a timeline of a step, which chrome://tracing and https://ui.perfetto.dev can show."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


@contextmanager
def record_timeline(path: Path) -> Iterator[None]:
    """Records the operators on the CPU and the kernels on the GPU that run in this context, and writes them to ``path``.

    Args:
        path: a new file, NAME.json.gz.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # otherwise it prints two lines about itself
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=activities) as profiler:
        yield
    profiler.export_chrome_trace(str(path))
