"""The pictures of ``plan.py``, as SVG: predicted against measured throughput, and how throughput scales with GPUs."""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

COLOURS = (
    "#3b6fb6", "#d9822b", "#2a8c6a", "#b8405e", "#8e5bb5", "#7a6a53", "#e0a100", "#1aa3b8", "#5b6773", "#c061a8", "#6f9a2b",
    "#274b7d", "#f08a7b", "#0f5c46", "#a3a9b0", "#5a2d82",
)  # fmt: skip
LEFT, TOP, WIDTH, HEIGHT = 74, 56, 600, 470
MARGIN = 24
"""Left of x = 0, for the label of the y axis."""
GREY, INK = "#c5ccd4", "#1c2733"


class Dot(NamedTuple):
    """A row of the table."""

    source: str
    name: str
    measured: float
    predicted: float


class Curve(NamedTuple):
    """Throughput per GPU at numbers of GPUs."""

    label: str
    predicted: bool
    points: Sequence[tuple[int, float]]


def _page(title: str, width: int, parts: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{-MARGIN} 0 {width + MARGIN} {TOP + HEIGHT + 58}" '
        f'font-family="system-ui, sans-serif" font-size="13" fill="{INK}">'
        f'<rect x="{-MARGIN}" width="100%" height="100%" fill="white"/>'
        f'<text x="{LEFT}" y="28" font-size="15" font-weight="600">{html.escape(title)}</text>'
        f"{''.join(parts)}</svg>\n"
    )


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" {style}/>'


def _text(x: float, y: float, text: str, style: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{html.escape(text)}</text>'


def _labels(below: str, beside: str) -> list[str]:
    middle = TOP + HEIGHT / 2
    turned = f'text-anchor="middle" transform="rotate(-90 -6 {middle:.0f})"'
    return [_text(LEFT + WIDTH / 2, TOP + HEIGHT + 44, below, 'text-anchor="middle"'), _text(-6, middle, beside, turned)]


def accuracy(dots: Sequence[Dot], title: str) -> str:
    """Draws one dot a row: measured tokens per GPU and second to the right, predicted ones upwards, both on a log scale."""
    values = [value for dot in dots for value in (dot.measured, dot.predicted)]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))

    def x(value: float) -> float:
        return LEFT + (math.log10(value) - low) / (high - low) * WIDTH

    def y(value: float) -> float:
        return TOP + HEIGHT - (math.log10(value) - low) / (high - low) * HEIGHT

    parts = []
    for power in range(low, high + 1):
        at, label = 10.0**power, f"{10**power:,}" if power >= 0 else f"{10.0**power:g}"
        parts += [
            _line(x(at), TOP, x(at), TOP + HEIGHT, f'stroke="{GREY}"'),
            _line(LEFT, y(at), LEFT + WIDTH, y(at), f'stroke="{GREY}"'),
        ]
        parts += [
            _text(x(at), TOP + HEIGHT + 20, label, 'text-anchor="middle"'),
            _text(LEFT - 8, y(at) + 4, label, 'text-anchor="end"'),
        ]
    first, last = 10.0**low, 10.0**high
    for factor, style in ((1.0, 'stroke-width="1.2"'), (1.1, 'stroke-dasharray="5 4"'), (1 / 1.1, 'stroke-dasharray="5 4"')):
        begin, end = max(first, first / factor), min(last, last / factor)
        parts.append(_line(x(begin), y(begin * factor), x(end), y(end * factor), f'stroke="#5b6773" {style}'))
    sources = sorted({dot.source for dot in dots})
    colours = {source: COLOURS[number % len(COLOURS)] for number, source in enumerate(sources)}
    for dot in dots:
        hint = f"{dot.name}: {dot.measured:,.0f} measured, {dot.predicted:,.0f} predicted"
        parts.append(
            f'<circle cx="{x(dot.measured):.1f}" cy="{y(dot.predicted):.1f}" r="3.4" fill="{colours[dot.source]}" '
            f'fill-opacity=".7"><title>{html.escape(hint)}</title></circle>'
        )
    for number, source in enumerate(sources):
        at = TOP + 10 + 22 * number
        count = sum(dot.source == source for dot in dots)
        parts.append(f'<circle cx="{LEFT + WIDTH + 26}" cy="{at}" r="5" fill="{colours[source]}"/>')
        parts.append(_text(LEFT + WIDTH + 38, at + 4, f"{source} ({count})"))
    parts.append(_text(LEFT + 12, TOP + 20, "dashed: 10 % off", 'fill="#5b6773"'))
    parts += _labels("measured tokens per GPU and second", "predicted, by a calibration that has not seen the row")
    return _page(title, LEFT + WIDTH + 180, parts)


def scaling(curves: Sequence[Curve], title: str) -> str:
    """Draws throughput per GPU over the number of GPUs; what is predicted is dashed, with open dots."""
    counts = sorted({gpus for curve in curves for gpus, _ in curve.points})
    top = 1.15 * max(tgs for curve in curves for _, tgs in curve.points)
    step = 10.0 ** math.floor(math.log10(top)) / (1 if top > 3 * 10.0 ** math.floor(math.log10(top)) else 5)
    first, last = math.log2(counts[0]), math.log2(counts[-1])

    def x(gpus: int) -> float:
        return LEFT + 20 + (math.log2(gpus) - first) / max(last - first, 1) * (WIDTH - 40)

    def y(tgs: float) -> float:
        return TOP + HEIGHT * (1 - tgs / top)

    apart = [gpus for gpus, after in itertools.pairwise(counts) if x(after) - x(gpus) > 45]
    parts = [_text(x(gpus), TOP + HEIGHT + 20, f"{gpus:,}", 'text-anchor="middle"') for gpus in (*apart, counts[-1])]
    for number in range(int(top / step) + 1):
        at = number * step
        parts.append(_line(LEFT, y(at), LEFT + WIDTH, y(at), f'stroke="{GREY}"'))
        parts.append(_text(LEFT - 8, y(at) + 4, f"{at:,.0f}", 'text-anchor="end"'))
    for number, curve in enumerate(curves):
        colour, dashed = COLOURS[number], 'stroke-dasharray="6 4"' if curve.predicted else ""
        places = " ".join(f"{x(gpus):.1f},{y(tgs):.1f}" for gpus, tgs in curve.points)
        parts.append(f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="2" {dashed}/>')
        fill = "white" if curve.predicted else colour
        for gpus, tgs in curve.points:
            parts.append(
                f'<circle cx="{x(gpus):.1f}" cy="{y(tgs):.1f}" r="4" fill="{fill}" stroke="{colour}" stroke-width="1.6">'
                f"<title>{gpus:,} GPUs: {tgs:,.0f}</title></circle>"
            )
        at = TOP + HEIGHT - 24 - 24 * (len(curves) - 1 - number)
        parts.append(_line(LEFT + 24, at - 4, LEFT + 64, at - 4, f'stroke="{colour}" stroke-width="2" {dashed}'))
        parts.append(_text(LEFT + 74, at, curve.label))
    parts += _labels("GPUs", "tokens per GPU and second")
    return _page(title, LEFT + WIDTH + 40, parts)
