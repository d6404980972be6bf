"""Timelines of a step: of the operators of one rank, which chrome://tracing and https://ui.perfetto.dev can show; and of the
passes and messages of all ranks of a pipeline, which ``observe.timeline`` draws."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from ..parallel.messages import Channels
from ..parallel.orders import Timed, bubble, orders, play
from ..parallel.spans import SEND, WAIT, Span


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


@contextmanager
def record_passes(channels: Channels, mode: str) -> Iterator[dict[str, Any]]:
    """Records the timeline of the first pipeline in this context. All ranks take part.

    Args:
        mode: the schedule.

    Yields:
        A dictionary, which rank 0 fills in at the end: see ``timeline``.
    """
    found: dict[str, Any] = {}
    with channels.spans.record() as spans:
        yield found
    everyone: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(spans, everyone)
    if everyone is not None:
        found.update(timeline([everyone[rank] for rank in channels.first], mode))


def timeline(ranks: Sequence[Sequence[Span]], mode: str) -> dict[str, Any]:
    """Returns the timeline of a pipeline.

    Args:
        ranks: what each pipeline rank has done in a step.
        mode: the schedule.

    Returns:
        The schedule; the numbers of model chunks per rank and of micro-batches; the measured share of idle time, and that of a
        simulation in which every pass takes as long as the median of its kind and stage; and for each rank its spans [kind,
        stage, micro-batch, start, end], in seconds from the first pass.
    """
    passes = [[Timed(*span[1:]) for span in spans if span.kind not in (SEND, WAIT)] for spans in ranks]
    chunks, micro_batches = (len({timed.action[n] for timed in passes[0]}) for n in (1, 2))
    times: dict[tuple[str, int], list[float]] = {}
    for action, start, end in chain(*passes):
        times.setdefault(action[:2], []).append(end - start)
    begin = min(timed.start for timed in chain(*passes))
    played = play(orders(mode, len(ranks), chunks, micro_batches), lambda action: statistics.median(times[action[:2]]))
    return {
        "schedule": mode, "chunks": chunks, "micro_batches": micro_batches,
        "idle": bubble(passes), "idle_played": bubble(played),
        "ranks": [
            [[kind, *action[1:], round(start - begin, 6), round(end - begin, 6)] for kind, action, start, end in spans]
            for spans in ranks
        ],
    }  # fmt: skip
