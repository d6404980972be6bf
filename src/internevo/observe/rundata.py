"""What a run folder says about its run, for the report. Whatever is missing or damaged is left out."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from .metrics import usable_rows

NUMBER = int | float | None
"""NaN is null in metrics.jsonl."""
Row = dict[str, Any]
Point = tuple[int, float]


@dataclass
class RunData:
    """The rows of a run, in the order of the steps."""

    folder: Path
    name: str
    """The job's name; that of the folder if the config is missing or damaged."""
    config: str
    """The text of config.json."""
    train: list[Row]
    valid: list[Row]
    samples: list[Row]
    events: list[Row]
    damaged: int
    """Number of damaged lines of metrics.jsonl."""

    @classmethod
    def read(cls, folder: Path) -> RunData:
        """Reads the files of a run folder."""
        train, damaged = usable_rows(folder / "metrics.jsonl", {"loss": NUMBER})
        valid, _ = usable_rows(folder / "metrics.jsonl", {"valid_loss": NUMBER})
        samples, _ = usable_rows(folder / "samples.jsonl", {"prompt": str, "text": str})
        events, _ = usable_rows(folder / "events.jsonl", {"time": int | float, "event": str})
        path = folder / "config.json"
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else "{}"
        name = _object(text).get("JOB_NAME")
        return cls(
            folder, name if isinstance(name, str) else folder.resolve().name, text, train, valid, samples, events, damaged
        )

    @property
    def start(self) -> Row:
        """The last event of a start, which has the facts about the run; empty if there is none."""
        return next((event for event in reversed(self.events) if event["event"] == "start"), {})

    def options(self) -> dict[str, Any]:
        """Returns key.path -> value of the config."""
        return dict(_flat(_object(self.config)))

    def median(self, key: str) -> float | None:
        """Returns the median of a number over the training steps."""
        values = [value for _, value in points(self.train, key)]
        return statistics.median(values) if values else None

    def seconds(self) -> float:
        """Returns how long the run has been running, without the time between its starts."""
        times = sorted([time for _, time in points(self.train, "time")] + [e["time"] for e in self.events])
        starts = {event["time"] for event in self.events if event["event"] == "start"}
        return sum(later - time for time, later in pairwise(times) if later not in starts)


def points(rows: list[Row], key: str) -> list[Point]:
    """Returns (step, value) of each row that has a number under ``key``; inner keys are separated by dots."""
    found = []
    for row in rows:
        value: Any = row
        for name in key.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            found.append((row["step"], value))
    return found


def smooth(values: list[Point]) -> list[Point]:
    """Returns the mean of two exponential moving averages over about a fiftieth of the points, one forward and one backward, so
    that the curve does not lag behind the values."""
    numbers = [value for _, value in values]
    forward, backward = _average(numbers), _average(numbers[::-1])[::-1]
    return [(step, (f + b) / 2) for (step, _), f, b in zip(values, forward, backward, strict=True)]


def _average(values: list[float]) -> list[float]:
    keep, total, weight, result = 1 - 2 / (len(values) / 50 + 2), 0.0, 0.0, []
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        result.append(total / weight)
    return result


def thin(values: list[Point], most: int = 1500) -> list[Point]:
    """Returns at most about ``most`` of the points: of each stretch the smallest and the largest, so that no spike is lost."""
    if len(values) <= most:
        return values
    size, result = 2 * len(values) / most, list[Point]()
    for number in range(most // 2):
        stretch = values[int(number * size) : int((number + 1) * size)]
        result += sorted({min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])})
    return result


def quantile(values: list[float], share: float) -> float:
    """Returns the value below which a share of the values is."""
    return sorted(values)[int(share * (len(values) - 1))]


def _object(text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _flat(values: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value
