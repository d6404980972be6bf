"""Draws layouts as dots, memory against throughput, as an SVG picture: what less memory costs."""

from __future__ import annotations

import html
from collections.abc import Sequence

from ..observe.marks import marks
from .report import GIB, describe
from .search import Candidate

LEFT, TOP, WIDTH, HEIGHT = 76, 46, 880, 420


def draw(title: str, front: Sequence[Candidate], best: Sequence[Candidate], own: Candidate | None, limit: int) -> str:
    """Draws them.

    Args:
        front: the fastest layouts within several limits of memory; a line connects them.
        best: the fastest layouts.
        own: the layout of the config.
        limit: bytes that a rank may have.
    """
    everything = [*front, *best, *([own] if own else [])]
    most = max(limit, *(candidate.memory.total for candidate in everything)) / GIB
    top = max(candidate.prediction.tgs for candidate in everything) * 1.06

    def x(gib: float) -> float:
        return LEFT + gib / most * WIDTH

    def y(tgs: float) -> float:
        return TOP + HEIGHT - tgs / top * HEIGHT

    def dots(candidates: Sequence[Candidate], colour: str, size: float) -> str:
        places = ((x(c.memory.total / GIB), y(c.prediction.tgs), _about(c)) for c in candidates)
        return "".join(
            f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="{size}" fill="{colour}"><title>{about}</title></circle>'
            for cx, cy, about in places
        )

    line = " ".join(
        f"{x(c.memory.total / GIB):.1f},{y(c.prediction.tgs):.1f}" for c in sorted(front, key=lambda c: c.memory.total)
    )
    end = x(limit / GIB)
    parts = [
        f'<line x1="{end:.1f}" y1="{TOP}" x2="{end:.1f}" y2="{TOP + HEIGHT}" stroke="#b3261e" stroke-dasharray="5 4"/>',
        f'<polyline points="{line}" fill="none" stroke="#3b6fb6" stroke-width="1.5"/>',
        dots(best, "#82cbb0", 5), dots(front, "#3b6fb6", 5), dots([own] if own else [], "#d9822b", 6),
        *(_mark(x(n), TOP + HEIGHT + 18, f"{n:g}", "middle") for n in marks(most, 8)),
        *(_mark(LEFT - 8, y(n) + 4, f"{n:,.0f}", "end") for n in marks(top, 8)),
    ]  # fmt: skip
    legend = (
        '<tspan fill="#3b6fb6">● fastest within its memory</tspan>  <tspan fill="#82cbb0">● the fastest</tspan>'
        + ('  <tspan fill="#d9822b">● the layout of the config</tspan>' if own else "")
        + '  <tspan fill="#b3261e">┆ the limit</tspan>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 24} {TOP + HEIGHT + 48}" '
        'font-family="system-ui, sans-serif" font-size="13" fill="#1c2733"><rect width="100%" height="100%" fill="white"/>'
        f'<text x="{LEFT}" y="18" font-size="15" font-weight="600">{html.escape(title)}</text>'
        f'<text x="{LEFT}" y="36">{legend}</text>'
        f'<rect x="{LEFT}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#9aa5b1"/>{"".join(parts)}'
        f'<text x="{LEFT + WIDTH / 2}" y="{TOP + HEIGHT + 38}" text-anchor="middle">GiB on the most loaded rank</text>'
        f'<text transform="translate(16 {TOP + HEIGHT / 2}) rotate(-90)" text-anchor="middle">tokens per GPU and second</text>'
        "</svg>\n"
    )


def _about(c: Candidate) -> str:
    return f"{html.escape(describe(c.choice))}: {c.prediction.tgs:,.0f} TGS, {c.memory.total / GIB:.1f} GiB"


def _mark(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="#5b6773">{text}</text>'
