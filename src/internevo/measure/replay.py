"""Plays the recorded allocations of a step (``measure.profile``) again, and adds them up: by kind, by phase, and by module."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..observe.memory import KINDS
from .profile import Event, Profile

POINTS = 400
"""Largest number of points of a timeline."""
ByKind = dict[str, int]
"""Kind -> bytes; and "total"."""


def replay(profile: Profile) -> dict[str, Any]:
    """Returns what was alive, and when.

    Returns:
        ``peak``: what was alive at the peak, by kind, with its total; the phase, the operator and the module that reached it.
        ``phases``: the name of each, its pass, its end in seconds, and by kind what was alive at its end and at its own peak.
        ``modules``: module -> kind -> bytes at the peak. ``kept``: the same after the pass that has left the most activations.
        ``timeline``: rows of the number of events, seconds, phase, and bytes of each kind.
    """
    events, phases = profile.events, profile.phases
    kinds = [block.kind(phases) for block in profile.blocks]
    now, ends, peaks = _nothing(), list[ByKind](), list[ByKind]()
    at, number, times = profile.existing - 1, 0, list[float]()
    rows = list[Row]()
    begin = profile.existing
    for event in events[:begin]:
        now[kinds[event.block]] += event.size
        now["total"] += event.size
    for phase_number, phase in enumerate(phases):
        peak = dict(now)
        for index in range(begin, phase.events):
            event = events[index]
            now[kinds[event.block]] += event.size
            now["total"] += event.size
            if now["total"] > peak["total"]:
                peak = dict(now)
                if now["total"] > max((one["total"] for one in peaks), default=-1):
                    at, number = index, phase_number
            _add_point(rows, index, event, phase_number, now, len(events))
        begin = phase.events
        peaks, ends = [*peaks, peak], [*ends, dict(now)]
        times.append(round(events[begin - 1].time, 6) if begin else 0.0)
    block = profile.blocks[events[at].block]
    passes = [n for n, phase in enumerate(phases) if phase.action is not None]
    fullest = max(reversed(passes), key=lambda n: ends[n]["activations"])
    return {
        "peak": {**peaks[number], "phase": phases[number].name, "operator": block.operator, "module": block.path},
        "phases": [
            {
                "name": phase.name,
                "pass": phase.action,
                "end": seconds,
                "events": phase.events,
                "alive": alive,
                "peak": peak,
            }
            for phase, seconds, alive, peak in zip(phases, times, ends, peaks, strict=True)
        ],
        "modules": _modules(profile, kinds, at + 1),
        "kept": {"pass": phases[fullest].action, "modules": _modules(profile, kinds, phases[fullest].events)},
        "timeline": [[row.events, round(row.time, 6), row.phase, *(row.alive[kind] for kind in KINDS)] for row in rows],
    }


def _nothing() -> ByKind:
    return {**dict.fromkeys(KINDS, 0), "total": 0}


class Row(NamedTuple):
    """A point of a timeline."""

    events: int
    """Number of events before it."""
    time: float
    phase: int
    alive: ByKind


def _add_point(rows: list[Row], index: int, event: Event, phase: int, now: ByKind, events: int) -> None:
    """Adds a point to a timeline. Of neighbouring points in one phase, the one with the most bytes stays."""
    if rows and rows[-1].phase == phase and rows[-1].events * POINTS // events == index * POINTS // events:
        if now["total"] > rows[-1].alive["total"]:
            rows[-1] = rows[-1]._replace(alive=dict(now))
    else:
        rows.append(Row(index, event.time, phase, dict(now)))


def _modules(profile: Profile, kinds: list[str], events: int) -> dict[str, dict[str, int]]:
    """Returns module -> kind -> bytes that are alive after a number of events."""
    sizes: defaultdict[int, int] = defaultdict(int)
    for event in profile.events[:events]:
        sizes[event.block] += event.size
    found: defaultdict[str, defaultdict[str, int]] = defaultdict(lambda: defaultdict(int))
    for number, size in sizes.items():
        if size:
            found[profile.blocks[number].path][kinds[number]] += size
    return {path: dict(found[path]) for path in sorted(found, key=_order)}


def _order(path: str) -> list[tuple[int, str]]:
    """Sorts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in path.split(".")]


def by_layer(modules: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, int]]:
    """Adds up modules to layers ("layers.0"), the embedding ("embed"), and so on; "" is what belongs to none."""
    found: defaultdict[str, defaultdict[str, int]] = defaultdict(lambda: defaultdict(int))
    for path, kinds in modules.items():
        for kind, size in kinds.items():
            found[_layer(path)][kind] += size
    return {layer: dict(kinds) for layer, kinds in found.items()}


def _layer(path: str) -> str:
    first, *rest = path.split(".")
    return f"{first}.{rest[0]}" if rest and rest[0].isdigit() else first
