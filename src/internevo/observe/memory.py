"""Draws the memory of a step, as ``monitor.memory`` records it, as SVG pictures: where it was at the peak, as a sunburst of the
model's modules; and what was alive when, as areas."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

from .marks import marks
from .units import size

KINDS = {
    "masters": ("master weights", "#1f4e8c"), "moments": ("moments", "#3b6fb6"), "weights": ("weights", "#8fb4e3"),
    "gradients": ("gradients", "#2a8c6a"), "activations": ("activations", "#d9822b"),
    "communication": ("communication", "#8e5bb5"), "temporary": ("temporary", "#b8495a"), "other": ("other", "#9aa5b1"),
}  # fmt: skip
"""Kind of memory -> what it is called, and its colour."""
WIDTH, HEIGHT, LEFT, TOP = 1100, 300, 84, 66
RADIUS, CENTRE, RINGS = 330, 70, 5
"""Of the sunburst. Modules that are deeper than its rings are drawn as one."""
INNER = ("#e3e9f1", "#edf1f6")
"""Colours of modules in turn."""
NO_MODULE = "no module"


def draw_peak(profile: Mapping[str, Any]) -> str:
    """Draws where the memory was at the peak: the modules from the inside to the outside, and the kinds of memory of each.

    Args:
        profile: the contents of memory/rank-N.json.

    Raises:
        ValueError: if it is not the contents of such a file.
    """
    try:
        return _sunburst(profile)
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(f"this is not the memory of a step: {error}") from error


def draw_timeline(profile: Mapping[str, Any]) -> str:
    """Draws what was alive when, in the order of the allocations. Arguments and errors as for ``draw_peak``."""
    try:
        return _areas(profile)
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(f"this is not the memory of a step: {error}") from error


def _svg(width: float, height: float, parts: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" font-family="system-ui, sans-serif" '
        f'font-size="13" fill="#1c2733"><rect width="100%" height="100%" fill="white"/>{"".join(parts)}</svg>\n'
    )


def _legend(peak: Mapping[str, Any], x: float, y: float, column: bool) -> str:
    """Returns the kinds with what they have at the peak."""
    parts = []
    for kind, (name, colour) in KINDS.items():
        if peak[kind]:
            text = f"{name} {size(peak[kind])}"
            parts.append(f'<rect x="{x:.0f}" y="{y - 12:.0f}" width="14" height="14" rx="2" fill="{colour}"/>')
            parts.append(f'<text x="{x + 20:.0f}" y="{y:.0f}">{text}</text>')
            x, y = (x, y + 24) if column else (x + 36 + 7 * len(text), y)
    return "".join(parts)


# The sunburst --------------------------------------------------------------------------------------------------------


class _Node:
    """A module, or a kind of memory of one."""

    def __init__(self, name: str, colour: str | None = None) -> None:
        self.name, self.colour, self.size = name, colour, 0
        self.children: dict[str, _Node] = {}

    def add(self, path: Sequence[str], kind: str, size: int) -> None:
        self.size += size
        if path:
            self.children.setdefault(path[0], _Node(path[0])).add(path[1:], kind, size)
        else:
            name, colour = KINDS[kind]
            leaf = self.children.setdefault(name, _Node(name, colour))
            leaf.size += size


def _sunburst(profile: Mapping[str, Any]) -> str:
    root = _Node("")
    for path, kinds in profile["modules"].items():
        for kind, nbytes in kinds.items():
            root.add((path or NO_MODULE).split(".")[: RINGS - 1], kind, int(nbytes))
    parts = list[str]()
    _rings(root, 0.0, 2 * math.pi / root.size, 0, "", parts)
    side, peak = 2 * RADIUS + 16, profile["peak"]
    middle = 'x="0" text-anchor="middle" font-size="15"'
    where = html.escape(f"{peak['phase']}: {peak['operator']} in {peak['module'] or NO_MODULE}")
    title = f"rank {profile['rank']:d} at its peak"
    return _svg(
        side + 260, side,
        [
            f'<g transform="translate({side / 2:g} {side / 2:g})">{"".join(parts)}',
            f'<text {middle} y="-4" font-weight="600">{size(root.size)}</text><text {middle} y="16">{title}</text></g>',
            f'<text x="{side + 12:g}" y="40" font-weight="600">{title}</text>',
            *(f'<text x="{side + 12:g}" y="{62 + 18 * n}" font-size="12" fill="#5b6773">{line}</text>'
              for n, line in enumerate(_lines(where, 40))),
            _legend(peak, side + 12, 150, column=True),
        ],
    )  # fmt: skip


def _lines(text: str, width: int) -> list[str]:
    lines = [""]
    for word in text.split(" "):
        if lines[-1] and len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def _rings(node: _Node, start: float, scale: float, depth: int, path: str, parts: list[str]) -> None:
    """Draws what is in a node, from the angle ``start`` on; ``scale``: radians per byte."""
    ring = (RADIUS - CENTRE) / RINGS
    for number, child in enumerate(node.children.values()):
        end, name = start + child.size * scale, f"{path}.{child.name}".strip(".")
        if end - start > 0.002:  # less would not be seen
            inner = CENTRE + depth * ring
            outer = inner + ring if child.colour is None else RADIUS
            about = html.escape(f"{name}: {size(child.size)}")
            shape = f'd="{_sector(start, end, inner, outer)}" fill="{child.colour or INNER[number % 2]}"'
            parts.append(f'<path {shape} stroke="white" stroke-width=".8"><title>{about}</title></path>')
            parts.append(_label(child, (start + end) / 2, inner, outer, end - start))
            _rings(child, start, scale, depth + 1, name, parts)
        start = end


def _sector(start: float, end: float, inner: float, outer: float) -> str:
    end = min(end, start + 2 * math.pi - 1e-4)  # the two ends of a full circle would be the same point
    large = int(end - start > math.pi)
    (ax, ay), (bx, by), (cx, cy), (dx, dy) = (
        (radius * math.sin(angle), -radius * math.cos(angle))
        for radius, angle in ((outer, start), (outer, end), (inner, end), (inner, start))
    )
    return (
        f"M{ax:.1f} {ay:.1f}A{outer:.1f} {outer:.1f} 0 {large} 1 {bx:.1f} {by:.1f}"
        f"L{cx:.1f} {cy:.1f}A{inner:.1f} {inner:.1f} 0 {large} 0 {dx:.1f} {dy:.1f}Z"
    )


def _label(node: _Node, angle: float, inner: float, outer: float, width: float) -> str:
    """Returns the name of a sector, along the radius, if there is room for it."""
    radius, name = (inner + outer) / 2, f"layer {node.name}" if node.name.isdigit() else node.name
    if width * radius < 12 or 6.4 * len(name) > outer - inner - 2:
        return ""
    degrees = math.degrees(angle) - 90
    turn = degrees + 180 if angle > math.pi else degrees
    x, y = radius * math.sin(angle), -radius * math.cos(angle)
    ink = "white" if node.colour is not None else "#1c2733"
    return (
        f'<text transform="translate({x:.1f} {y:.1f}) rotate({turn:.1f})" text-anchor="middle" dy="4" font-size="11" '
        f'fill="{ink}" pointer-events="none">{html.escape(name)}</text>'
    )


# The areas -----------------------------------------------------------------------------------------------------------


def _areas(profile: Mapping[str, Any]) -> str:
    rows, peak, phases = profile["timeline"], profile["peak"], profile["phases"]
    first = rows[0][0]
    sums = [sum(row[3:]) for row in rows]
    top = max(sums)
    across, up = WIDTH / (phases[-1]["events"] - first), HEIGHT / top
    xs = [LEFT + (row[0] - first) * across for row in rows]
    parts, below = [_vertical_axis(top)], [0.0] * len(rows)
    for column, (name, colour) in enumerate(KINDS.values(), 3):
        above = [y + row[column] for y, row in zip(below, rows, strict=True)]
        if above != below:
            edge = [(x, TOP + HEIGHT - y * up) for x, y in zip(xs, above, strict=True)]
            edge += [(x, TOP + HEIGHT - y * up) for x, y in zip(reversed(xs), reversed(below), strict=True)]
            points = " ".join(f"{x:.1f},{y:.1f}" for x, y in edge)
            parts.append(f'<polygon points="{points}" fill="{colour}"><title>{name}</title></polygon>')
        below = above
    at = xs[sums.index(top)]
    parts.append(
        f'<line x1="{at:.1f}" y1="{TOP - 6}" x2="{at:.1f}" y2="{TOP + HEIGHT}" stroke="#1c2733" stroke-dasharray="3 3"/>'
    )
    title = f"rank {profile['rank']:d}: what was alive when, in the order of the allocations; the peak is {size(top)}"
    parts.append(f'<text x="{LEFT}" y="20" font-size="15" font-weight="600">{title}</text>{_legend(peak, LEFT, 46, False)}')
    for phase in phases:
        parts.append(_phase(phase, LEFT + (first - rows[0][0]) * across, LEFT + (phase["events"] - rows[0][0]) * across))
        first = phase["events"]
    return _svg(LEFT + WIDTH + 24, TOP + HEIGHT + 130, parts)


def _phase(phase: Mapping[str, Any], start: float, end: float) -> str:
    """Returns the place of a phase under the areas, and over them what it has to say."""
    name, bottom = html.escape(str(phase["name"])), TOP + HEIGHT
    about = f"{name}: {size(phase['alive']['total'])} at its end, {size(phase['peak']['total'])} at its peak"
    label, box = "", f'x="{start:.1f}" y="{TOP}" width="{end - start:.1f}" height="{HEIGHT}" fill="transparent"'
    if end - start > 13:
        place = f"translate({(start + end) / 2:.1f} {bottom + 12}) rotate(-35)"
        short = name.replace("micro-batch", "mb")
        label = f'<text transform="{place}" text-anchor="end" font-size="11">{short}</text>'
    line = f'x1="{end:.1f}" y1="{TOP}" x2="{end:.1f}" y2="{bottom + 6}" stroke="#1c2733" stroke-width=".4"'
    return f"<line {line}/>{label}<rect {box}><title>{about}</title></rect>"


def _vertical_axis(top: float) -> str:
    """Returns the axis of the bytes, with about five marks at round numbers."""
    parts = []
    for nbytes in marks(top, 5):
        y = TOP + HEIGHT - nbytes / top * HEIGHT
        parts.append(f'<line x1="{LEFT - 5}" y1="{y:.1f}" x2="{LEFT + WIDTH}" y2="{y:.1f}" stroke="#dde2e8"/>')
        parts.append(f'<text x="{LEFT - 9}" y="{y + 4:.1f}" text-anchor="end" fill="#5b6773">{size(nbytes)}</text>')
    return "".join(parts)


# The table -----------------------------------------------------------------------------------------------------------


def peaks_table(ranks: Sequence[Mapping[str, Any]], most: int = 16) -> str:
    """Returns the peaks of all ranks as an HTML table; of more than ``most``, those of the highest rank of each stage.

    Args:
        ranks: ``ranks`` of memory.json.

    Raises:
        ValueError: if it is not.
    """
    try:
        peaks = [(rank, row["peak"]) for rank, row in enumerate(ranks)]
        if len(peaks) > most:
            highest = dict[str, tuple[int, Mapping[str, Any]]]()
            for rank, peak in sorted(peaks, key=lambda pair: pair[1]["measured"]):
                highest[str(peak["stages"])] = rank, peak
            peaks = sorted(highest.values(), key=lambda pair: pair[1]["stages"])
        shown = [kind for kind in KINDS if any(peak[kind] for _, peak in peaks)]
        names = ["rank", "stages", "peak", *(KINDS[kind][0] for kind in shown), "slack", "reached in"]
        rows = [
            [str(rank), ", ".join(map(str, peak["stages"])), size(peak["measured"]), *(size(peak[kind]) for kind in shown),
             size(peak["slack"]), str(peak["phase"])]
            for rank, peak in peaks
        ]  # fmt: skip
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"this is not the memory of all ranks: {error}") from error
    cells = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    head = "".join(f"<th>{name}</th>" for name in names)
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"
