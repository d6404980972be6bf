"""Draws the timeline of a pipeline, as ``monitor.trace`` measures it, as an SVG picture: one row per rank."""

from __future__ import annotations

import html
from typing import Any

from ..wording import counted
from .marks import marks

LABELS = {
    "F": "forward", "B": "backward", "W": "gradients of the weights", "send": "send", "wait": "wait for a message",
    "idle": "idle",
}  # fmt: skip
COLOURS = {
    "F": ("#3b6fb6", "#8fb4e3"), "B": ("#2a8c6a", "#82cbb0"), "W": ("#d9822b", "#f3bd84"), "send": ("#8e5bb5",),
    "wait": ("#dde2e8",), "idle": ("#f4f6f8",),
}  # fmt: skip
"""Those of a kind alternate from one model chunk of a rank to the next."""
LEFT, TOP, ROW, GAP, WIDTH = 104, 62, 36, 7, 1100


def draw(timeline: dict[str, Any]) -> str:
    """Draws a timeline.

    Args:
        timeline: the contents of timeline.json (``measure.timeline``).

    Raises:
        ValueError: if it is not the contents of such a file.
    """
    try:
        return _picture(timeline)
    except (ArithmeticError, LookupError, TypeError) as error:
        raise ValueError(f"this is not the timeline of a pipeline: {error}") from error


def _picture(timeline: dict[str, Any]) -> str:
    ranks = timeline["ranks"]
    length = max(end for spans in ranks for *_, end in spans)
    scale = WIDTH / length
    rows = [_row(number, spans, len(ranks), scale) for number, spans in enumerate(ranks)]
    bottom = TOP + len(ranks) * (ROW + GAP)
    kinds = [kind for kind in LABELS if kind == "idle" or any(kind == span[0] for spans in ranks for span in spans)]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 24} {bottom + 42}" '
        'font-family="system-ui, sans-serif" font-size="13" fill="#1c2733">'
        f'<rect width="100%" height="100%" fill="white"/>{_title(timeline)}{_legend(kinds, timeline["chunks"])}'
        f"{''.join(rows)}{_axis(length, bottom)}</svg>\n"
    )


def name_of(schedule: str, chunks: int) -> str:
    """Returns what a schedule is called."""
    return "interleaved 1F1B" if schedule == "1F1B" and chunks > 1 else schedule


def _title(timeline: dict[str, Any]) -> str:
    name = html.escape(str(name_of(timeline["schedule"], timeline["chunks"])))
    facts = f"{counted(len(timeline['ranks']), 'rank')}, {counted(timeline['micro_batches'], 'micro-batch')}"
    idle = f"the ranks are idle {timeline['idle']:.1%} of the time (simulated: {timeline['idle_played']:.1%})"
    return f'<text x="{LEFT}" y="20" font-size="15"><tspan font-weight="600">{name}</tspan>, {facts}: {idle}</text>'


def _legend(kinds: list[str], chunks: int) -> str:
    parts, x = [], float(LEFT)
    for kind in kinds:
        for colour in COLOURS[kind][:chunks]:
            box = f'x="{x:.0f}" y="33" width="14" height="14" rx="2" fill="{colour}"'
            parts.append(f'<rect {box} stroke="#c5ccd4" stroke-width=".5"/>')
            x += 16
        parts.append(f'<text x="{x + 4:.0f}" y="45">{LABELS[kind]}</text>')
        x += 24 + 7 * len(LABELS[kind])
    if chunks > 1:
        parts.append(f'<text x="{x:.0f}" y="45" fill="#5b6773">(two shades: model chunks in turn)</text>')
    return "".join(parts)


def _row(rank: int, spans: list[Any], ranks: int, scale: float) -> str:
    """Returns a rank's row. Where nothing is drawn over its background, the rank is idle."""
    y, stages = TOP + rank * (ROW + GAP), sorted({stage for kind, stage, *_ in spans if kind in "FBW"})
    about = f"stage{'s' * (len(stages) > 1)} {', '.join(f'{stage:d}' for stage in stages)}"
    parts = [
        f'<text x="{LEFT - 10}" y="{y + 16}" text-anchor="end">rank {rank}</text>',
        f'<text x="{LEFT - 10}" y="{y + 30}" text-anchor="end" font-size="11" fill="#5b6773">{about}</text>',
        f'<rect x="{LEFT}" y="{y}" width="{WIDTH}" height="{ROW}" fill="{COLOURS["idle"][0]}"/>',
    ]
    for kind, stage, micro_batch, start, end in spans:
        start = max(start, 0.0)  # the others wait before the first pass begins
        x, width = LEFT + start * scale, (end - start) * scale
        if width < 0.2:
            continue
        shade = stage // ranks % len(COLOURS[kind])
        box = f'x="{x:.1f}" y="{y}" width="{width:.1f}" height="{ROW}" fill="{COLOURS[kind][shade]}"'
        line = ' stroke="white" stroke-width=".8"' if kind in "FBW" else ""
        about = f"{LABELS[kind]}, stage {stage:d}, micro-batch {micro_batch:d}: {(end - start) * 1e3:.2f} ms"
        parts.append(f"<rect {box}{line}><title>{about}</title></rect>")
        if kind in "FBW" and width > 7 + 7 * len(str(micro_batch)):
            ink = "#1c2733" if shade else "white"
            parts.append(
                f'<text x="{x + width / 2:.1f}" y="{y + ROW / 2 + 4.5}" text-anchor="middle" fill="{ink}" font-size="12" '
                f'pointer-events="none">{micro_batch:d}</text>'
            )
    return "".join(parts)


def _axis(length: float, y: int) -> str:
    """Returns the axis of the time, with about ten marks at round numbers of milliseconds."""
    parts = [f'<line x1="{LEFT}" y1="{y}" x2="{LEFT + WIDTH}" y2="{y}" stroke="#9aa5b1"/>']
    for seconds in marks(length, 10):
        x = LEFT + seconds / length * WIDTH
        unit = " ms" if seconds == 0 else ""
        parts.append(f'<line x1="{x:.1f}" y1="{y}" x2="{x:.1f}" y2="{y + 5}" stroke="#9aa5b1"/>')
        parts.append(f'<text x="{x:.1f}" y="{y + 20}" text-anchor="middle" fill="#5b6773">{seconds * 1e3:g}{unit}</text>')
    return "".join(parts)
