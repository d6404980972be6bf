"""Draws the timeline of one rank as a picture: ``python benchmarks/timeline.py runs/X/trace-rank0.json.gz --out timeline.svg``;
or that of all ranks of a pipeline: ``python benchmarks/timeline.py runs/X/timeline.json --out timeline.svg``.

The files are those of ``monitor.trace=true``. The picture of a pipeline is the one in report.html. In that of one rank on a
CPU, one lane has the main thread's products and attention and where it waits for a collective, the others gloo's threads; on a
GPU one lane has all kernels that compute, the others the streams that carry collectives. Also printed: in how much of the time
with a collective under way something is computed.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

from internevo.observe.timeline import draw as draw_pipeline

COMPUTE = ("aten::mm", "aten::addmm", "aten::bmm", "internevo::document_attention", "aten::_scaled_dot_product_flash_attention")
WAIT = "_c10d_functional::wait_tensor"
COLOURS = {"compute": "#4c78a8", "wait": "#e45756", "all_gather": "#54a24b", "all_reduce": "#f58518", "all_to_all": "#b279a2"}
LABELS = {
    "compute": "products, attention", "wait": "waiting", "all_gather": "all-gather",
    "all_reduce": "reduce-scatter, all-reduce", "all_to_all": "all-to-all",
}  # fmt: skip
KINDS = {
    "allgather": "all_gather", "reducescatter": "all_reduce", "allreduce": "all_reduce", "alltoall": "all_to_all",
    "sendrecv": "all_to_all",
}  # fmt: skip
"""By the names that gloo and NCCL give their collectives."""
Event = tuple[str, float, float]
"""Kind, start and length in milliseconds."""


def lanes(path: Path) -> dict[str, list[Event]]:
    """What is computed, and the events of every thread or stream that carries collectives."""
    events: list[dict[str, Any]] = [
        e for e in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"] if e.get("ph") == "X"
    ]
    kernels = [e for e in events if e.get("cat") == "kernel"]
    events = kernels or events
    main = Counter(e["tid"] for e in events).most_common(1)[0][0]
    start = min(e["ts"] for e in events if e["tid"] == main)
    found: dict[str, list[Event]] = {"main": []}
    for e in events:
        name, at, length = e["name"], (e["ts"] - start) / 1e3, e["dur"] / 1e3
        carrier = next((who for who in ("gloo:", "nccl") if name.startswith(who)), None)
        if carrier:
            kind = next((kind for part, kind in KINDS.items() if part in name.lower().replace("_", "")), None)
            if kind:
                found.setdefault(f"{carrier.strip(':')} {e['tid']}", []).append((kind, at, length))
        elif kernels or (e["tid"] == main and name.startswith(COMPUTE)):
            found["main"].append(("compute", at, length))
        elif e["tid"] == main and name == WAIT:
            found["main"].append(("wait", at, length))
    return found


def hidden(found: dict[str, list[Event]]) -> float:
    """Share of the time with a collective under way in which something was computed."""
    compute = [event for event in found["main"] if event[0] == "compute"]
    carried = [event for lane, events in found.items() if lane != "main" for event in events]
    both = duration(compute) + duration(carried) - duration([*compute, *carried])
    return both / duration(carried)


def duration(events: list[Event]) -> float:
    """Milliseconds in which at least one of the events goes on."""
    total, reached = 0.0, -1.0
    for _, at, length in sorted(events, key=lambda event: event[1]):
        total += max(0.0, at + length - max(at, reached))
        reached = max(reached, at + length)
    return total


def draw(found: dict[str, list[Event]], first: float, last: float, width: int = 1000) -> str:
    """SVG of the time from ``first`` to ``last``, in milliseconds."""
    scale, height = width / (last - first), 34
    rows = []
    for number, (lane, events) in enumerate(found.items()):
        y = 30 + number * (height + 8)
        rows.append(f'<text x="0" y="{y + 21}">{lane}</text>')
        for kind, at, length in events:
            a, b = max(at, first), min(at + length, last)
            if b > a:
                box = f'x="{90 + (a - first) * scale:.1f}" y="{y}" width="{max(0.4, (b - a) * scale):.1f}" height="{height}"'
                rows.append(f'<rect {box} fill="{COLOURS[kind]}"><title>{kind} {length:.2f} ms</title></rect>')
    kinds = [kind for kind in COLOURS if any(kind == event[0] for events in found.values() for event in events)]
    legend, x = [], 90
    for kind in kinds:
        legend.append(f'<rect x="{x}" y="4" width="14" height="14" fill="{COLOURS[kind]}"/>')
        legend.append(f'<text x="{x + 19}" y="16">{LABELS[kind]}</text>')
        x += 40 + 8 * len(LABELS[kind])
    legend.append(f'<text x="{width + 90}" y="16" text-anchor="end">{last - first:.0f} ms</text>')
    total = 30 + len(found) * (height + 8)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width + 100} {total}" font-family="sans-serif" font-size="13">'
        f'<rect width="100%" height="100%" fill="white"/>{"".join(legend + rows)}</svg>\n'
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trace", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--window", type=float, nargs=2, metavar=("FIRST", "LAST"), help="milliseconds; default: all")
    a = parser.parse_args()
    if a.trace.suffix == ".json":
        a.out.write_text(draw_pipeline(json.loads(a.trace.read_text(encoding="utf-8"))), encoding="utf-8")
        return
    found = lanes(a.trace)
    end = max(at + length for _, at, length in found["main"])
    a.out.write_text(draw(found, *(a.window or (0.0, end))), encoding="utf-8")
    print(f"{end:.0f} ms; {hidden(found):.0%} of the time with a collective under way, something was computed")


if __name__ == "__main__":
    main()
