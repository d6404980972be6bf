"""The figures of the report, as the data and layouts that Plotly.js draws. Their x is the step; the page can change it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

from ..wording import counted
from .rundata import Point, Row, RunData, points, quantile, smooth, thin

COLOURS = ("#1f6fb5", "#d9722b", "#2a8c6a", "#8e5bb5", "#b8495a", "#7a6a2f", "#3fa0a8", "#5b6773")
"""Of runs, or of the lines of a figure."""
GRID, INK = "#e3e9f1", "#1c2733"
FEW = 20
"""Fewer points are not smoothed."""
Figure = dict[str, Any]


def figures(runs: Sequence[RunData]) -> list[Figure]:
    """Returns the figures about the training of one run, or of several that are compared. A figure without data is left out."""
    several = len(runs) > 1
    made = [
        _loss(runs),
        *([] if several else [_by_type(runs[0])]),
        _gradients(runs),
        _simple(runs, "Throughput", "tgs", "tokens per device per second", zero=True),
        _simple(runs, "MFU", "mfu", "% of the peak", scale=100, zero=True),
        _simple(runs, "Learning rate", "lr", "", zero=True),
        _simple(runs, "Peak memory", "memory_peak_max", "GiB, largest rank", scale=2**-30, zero=True),
        _times(runs),
        _simple(runs, "Largest load of an expert", "moe.max_load", "multiple of the mean load"),
        _simple(runs, "Entropy of the routers", "moe.entropy", "nats"),
        _simple(runs, "Dropped choices of experts", "moe.dropped", "%", scale=100, zero=True),
        *([] if several else [_experts(runs[0])]),
    ]
    drawn = [figure for figure in made if figure is not None and figure["data"]]
    for figure in drawn if several else ():  # the names of runs may be long
        figure["layout"]["legend"] = {"orientation": "h", "x": 0, "y": 0, "yref": "container", "yanchor": "bottom"}
        figure["layout"]["height"] += 20 * max(0, len(runs) - 4)  # each may need a line of the legend
    return drawn


def axes(run: RunData) -> dict[str, list[float]]:
    """Returns what the page needs to turn steps into tokens or hours: for some steps the tokens so far and the hours since the
    first step."""
    rows = [row for row in run.train if all(isinstance(row.get(key), int | float) for key in ("consumed_tokens", "time"))]
    rows = rows[:: max(1, len(rows) // 1000)] + rows[-1:]
    hours = [(row["time"] - rows[0]["time"]) / 3600 for row in rows]
    return {"step": [row["step"] for row in rows], "tokens": [row["consumed_tokens"] for row in rows], "hours": hours}


def timeline(run: RunData) -> Figure | None:
    """Returns the figure of what happened when: starts, steps, evaluations, saves, skipped steps and samples over the time."""
    times = {row["step"]: row["time"] for row in run.train if isinstance(row.get("time"), int | float)}
    kinds: dict[str, list[tuple[float, str]]] = {
        "skipped": [(times[step], f"step {step}") for step in skipped(run) if step in times],
        "evaluation": [
            (row["time"], f"step {row['step']}: {_short(row['valid_loss'])}")
            for row in run.valid if isinstance(row.get("time"), int | float)
        ],
        "save": [(e["time"], f"step {e['step']}: {e.get('seconds', 0):.1f} s") for e in run.events if e["event"] == "save"],
        "stop": [(e["time"], f"after step {e['step']}") for e in run.events if e["event"] == "stop"],
        "start": [
            (e["time"], f"after step {e['step']}" + (f", on {counted(e['processes'], 'process')}" if "processes" in e else ""))
            for e in run.events if e["event"] == "start"
        ],
    }  # fmt: skip
    marks = {"skipped": "x", "evaluation": "circle", "save": "square", "stop": "line-ns-open", "start": "triangle-right"}
    data = [
        {
            "type": "scatter", "mode": "markers", "name": kind, "y": [kind] * len(found), "text": [text for _, text in found],
            "x": [1000 * time for time, _ in found], "hovertemplate": "%{x}<br>%{text}<extra></extra>",
            "marker": {"size": 10, "symbol": marks[kind], "color": colour, "line": {"width": 2, "color": colour}},
        }
        for (kind, found), colour in zip(kinds.items(), COLOURS[4::-1], strict=False) if found
    ]  # fmt: skip
    if not data or not run.events:
        return None
    figure = _figure("What happened when", data, "")
    figure["layout"] |= {"height": 110 + 34 * len(data), "showlegend": False, "hovermode": "closest"}
    figure["layout"]["xaxis"] |= {"type": "date", "title": {"text": ""}}
    figure["layout"]["margin"]["l"] = 84
    return figure | {"fixed": True, "wide": True}


def _loss(runs: Sequence[RunData]) -> Figure:
    data, seen = list[Row](), list[float]()
    for number, run in enumerate(runs):
        colour, valid = COLOURS[number % len(COLOURS)], points(run.valid, "valid_loss")
        name, label = (run.name, f"{run.name}, validation") if len(runs) > 1 else ("training", "validation")
        data += _smoothed(points(run.train, "loss"), name, colour, number)
        if valid:
            mark = {"size": 7, "symbol": "diamond", "color": colour if len(runs) > 1 else COLOURS[1]}
            line = _line(thin(valid), label, str(mark["color"]), number)
            data.append(line | {"mode": "lines+markers", "marker": mark, "showlegend": len(runs) == 1})
        seen += [value for _, value in [*points(run.train, "loss"), *valid]]
    figure = _figure("Loss", data, "nats per token")
    if seen:
        _limit(figure, seen, log=False)
    if len(runs) == 1:
        figure["layout"]["shapes"] = _events(runs[0])
    return figure | {"wide": True}


def _events(run: RunData) -> list[Row]:
    """Returns vertical lines: dotted for saves, dashed for resumes, red for skipped steps."""
    saves = [event["step"] for event in run.events if event["event"] == "save"]
    resumes = [event["step"] for event in run.events if event["event"] == "start" and event["step"]]
    kinds = ((saves, "#9aa5b1", "dot", 1), (resumes, "#8e5bb5", "dash", 2), (skipped(run), "#c0392b", "solid", 1))
    return [
        {"type": "line", "x0": step, "x1": step, "y0": 0, "y1": 1, "yref": "paper", "layer": "below",
         "line": {"color": colour, "dash": dash, "width": width}}
        for steps, colour, dash, width in kinds for step in steps[:: max(1, len(steps) // 100)]
    ]  # fmt: skip


def skipped(run: RunData) -> list[int]:
    """Returns the steps that were skipped, because their gradients were not finite."""
    return [row["step"] for row in run.train if row.get("skipped") is True]


def _by_type(run: RunData) -> Figure | None:
    names = sorted({str(name) for row in run.train for name in (row.get("loss_by_type") or {})})
    data = list[Row]()
    for number, name in enumerate(names):
        rows = [{"step": row["step"], "value": (row.get("loss_by_type") or {}).get(name)} for row in run.train]
        data += _smoothed(points(rows, "value"), name, COLOURS[number % len(COLOURS)], 0)
    return _figure("Loss by dataset", data, "nats per token") if len(names) > 1 else None


def _gradients(runs: Sequence[RunData]) -> Figure:
    """On a log axis between the usual norms. A spike beyond it is a triangle at the edge, which tells its value."""
    data, seen = list[Row](), list[float]()
    for number, run in enumerate(runs):
        norms = [(step, norm) for step, norm in points(run.train, "grad_norm") if norm > 0]
        data += _smoothed(norms, run.name if len(runs) > 1 else "norm", COLOURS[number % len(COLOURS)], number, math.log)
        seen += [norm for _, norm in norms]
    figure = _figure("Gradient norm", data, "before clipping")
    if not seen:
        return figure
    top = _limit(figure, seen, log=True)
    for number, run in enumerate(runs):
        norms = points(run.train, "grad_norm")
        figure["data"] += _beyond(norms, top, "gradient norm", COLOURS[number % len(COLOURS)], number)
    return figure


def _limit(figure: Figure, values: list[float], log: bool) -> float:
    """Limits the y axis to what is usual, so that few values far above it ruin nothing. Returns the upper limit."""
    if log:
        few, many = quantile(values, 0.1), quantile(values, 0.9)
        usual = [value for value in values if few / 10 <= value <= 10 * many]
        low, high = min(usual) / 1.5, max(usual) * 1.5
        span = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
        ticks = [factor * 10.0**power for power in span for factor in ((1, 2, 5) if len(span) < 4 else (1,))]
        axis = {"type": "log", "range": [math.log10(low), math.log10(high)], "tickmode": "array", "tickvals": ticks}
        figure["layout"]["yaxis"] |= axis | {"ticktext": [f"{tick:g}" for tick in ticks]}
    else:
        low, edge = min(values), max(quantile(values, 0.97), *values[: max(1, len(values) // 20)])
        high = min(max(values), edge + 0.5 * (edge - low))
        room = 0.04 * (high - low) or 0.5
        figure["layout"]["yaxis"]["range"] = [low - room, high + room]
    return high


def _simple(runs: Sequence[RunData], title: str, key: str, unit: str, scale: float = 1.0, zero: bool = False) -> Figure:
    data, seen = list[Row](), list[float]()
    for number, run in enumerate(runs):
        found = [(step, value * scale) for step, value in points(run.train, key)]
        name = run.name if len(runs) > 1 else title
        data += _smoothed(found, name, COLOURS[number % len(COLOURS)], number) if key == "tgs" else (
            [_line(thin(found), name, COLOURS[number % len(COLOURS)], number)] if found else []
        )  # fmt: skip
        seen += [value for _, value in found]
    figure = _figure(title, data, unit)
    figure["layout"]["showlegend"] = len(runs) > 1
    if zero:
        figure["layout"]["yaxis"] |= {"rangemode": "tozero", "exponentformat": "power" if key == "lr" else "SI"}
    return figure


def _times(runs: Sequence[RunData]) -> Figure:
    """The time of a step, and how much of it was waiting for data. A slow step beyond the axis is a triangle at the edge."""
    kinds = (("step_time", "step", "solid"), ("data_time", "waiting for data", "dot"))
    times = {key: [points(run.train, key) for run in runs] for key, *_ in kinds}
    usual = [quantile([value for _, value in found], 0.9) for of in times.values() for found in of if found]
    top, data = 1.2 * max(usual, default=1.0), list[Row]()
    for (number, run), (key, name, dash) in product(enumerate(runs), kinds):
        found, several = times[key][number], len(runs) > 1
        if not found:
            continue
        colour = COLOURS[number % len(COLOURS)] if several else COLOURS[int(key == "data_time")]
        inside = [(step, value) for step, value in found if value <= top]
        line = _line(thin(inside), f"{run.name}: {name}" if several else name, colour, number)
        data.append(line | ({"line": line["line"] | {"dash": dash}, "showlegend": key == "step_time"} if several else {}))
        data += _beyond(found, top, line["name"], colour, number, " s")
    figure = _figure("Step time and data time", data, "s")
    figure["layout"]["yaxis"]["range"] = [0, top]
    return figure


def _beyond(found: list[Point], top: float, name: str, colour: str, run: int, unit: str = "") -> list[Row]:
    """Returns triangles at the upper edge in place of the values above it, which they tell."""
    beyond = [(step, value) for step, value in thin(found) if value > top]
    if not beyond:
        return []
    triangles = {"symbol": "triangle-up", "size": 9, "color": colour}
    return [
        _line([(step, top) for step, _ in beyond], "beyond the axis", colour, run)
        | {"mode": "markers", "cliponaxis": False, "showlegend": False, "marker": triangles,
           "text": [f"{value:.4g}{unit}" for _, value in beyond], "hovertemplate": f"%{{text}}<extra>{name}</extra>"}
    ]  # fmt: skip


def _experts(run: RunData) -> Figure | None:
    """The share of the tokens that each expert gets, as a heat map over the steps."""
    rows = [
        (row["step"], row["moe"]["load"])
        for row in run.train
        if isinstance(row.get("moe"), dict) and _is_load(row["moe"].get("load"))
    ]
    experts = {len(load) for _, load in rows}
    if len(experts) != 1:
        return None
    count, size = experts.pop(), max(1, len(rows) // 200)
    stretches = [rows[at : at + size] for at in range(0, len(rows), size)]
    columns = [[sum(load[e] for _, load in stretch) / len(stretch) * count for e in range(count)] for stretch in stretches]
    figure = _figure(
        "Load of each expert",
        [{
            "type": "heatmap", "x": [stretch[0][0] for stretch in stretches], "y": list(range(count)), "meta": 0,
            "z": [[column[e] for column in columns] for e in range(count)], "zmin": 0, "zmax": 2,
            "colorscale": [[0, "#1f6fb5"], [0.5, "#f7f7f7"], [1, "#c0392b"]], 
                "colorbar": {"title": {"text": "x mean"}, "thickness": 12},
            "hovertemplate": "step %{x}, expert %{y}: %{z:.2f} times the mean<extra></extra>",
        }],
        "expert",
    )  # fmt: skip
    figure["layout"] |= {"hovermode": "closest", "height": min(700, max(340, 120 + 8 * count))}
    return figure | {"wide": True}


def _is_load(load: Any) -> bool:
    return isinstance(load, list) and bool(load) and all(isinstance(share, int | float) for share in load)


def _smoothed(found: list[Point], name: str, colour: str, run: int, scale: Callable[[float], float] | None = None) -> list[Row]:
    """Returns a smoothed line, and behind it the values themselves, faint. ``scale``: math.log to smooth on a log axis."""
    if len(found) < FEW:
        return [_line(found, name, colour, run)] if found else []
    averaged = smooth([(step, scale(value)) for step, value in found] if scale else found)
    if scale:
        averaged = [(step, math.exp(value)) for step, value in averaged]
    raw = _line(thin(found), f"{name}, each step", colour, run)
    faint = {"opacity": 0.28, "showlegend": False, "line": {"color": colour, "width": 1}, "hoverinfo": "skip"}
    return [raw | faint, _line(thin(averaged), name, colour, run)]


def _line(found: list[Point], name: str, colour: str, run: int) -> Row:
    """Returns a line. ``run``: whose steps its x are."""
    x, y = [step for step, _ in found], [value for _, value in found]
    return {"type": "scatter", "mode": "lines" if len(found) > 1 else "markers", "x": x, "y": y, "name": name, "meta": run,
            "line": {"color": colour, "width": 2}, "marker": {"color": colour}}  # fmt: skip


def _figure(title: str, data: list[Row], unit: str) -> Figure:
    axis = {"gridcolor": GRID, "zerolinecolor": GRID, "automargin": True}
    layout = {
        "title": {"text": title, "font": {"size": 15}, "x": 0, "xref": "paper"}, "height": 320,
        "margin": {"l": 56, "r": 12, "t": 44, "b": 40},
        "hovermode": "x unified", "paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": INK},
        "legend": {"orientation": "h", "x": 1, "xanchor": "right", "y": 1.0, "yanchor": "bottom"},
        "xaxis": axis | {"title": {"text": "step"}}, "yaxis": axis | {"title": {"text": unit}},
        "showlegend": sum(row.get("showlegend", True) for row in data) > 1,
    }  # fmt: skip
    return {"data": data, "layout": layout}


def _short(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else "no loss"
