"""report.html: one file with plots, figures, the config and samples. It contains everything it needs, so it works offline."""

from __future__ import annotations

import html
import json
import secrets
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..storage.jsonfile import read_object
from ..storage.naming import naming
from .memory import draw_peak, draw_timeline, peaks_table
from .metrics import usable_rows
from .timeline import draw

NUMBER = int | float | None
"""NaN is null in metrics.jsonl."""
HEAD = "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>"
"""The beginning of every report."""
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1200px; padding: 0 1rem; color: #1c2733; }
h1 { margin-bottom: 0 } h2 { margin-top: 2.5rem }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(520px, 1fr)); gap: 1rem }
.plots > div { min-width: 0 }
.figures { display: flex; flex-wrap: wrap; gap: 1rem; margin-top: 1rem }
.figure { background: #f2f5f9; border-radius: 8px; padding: .7rem 1.1rem }
.figure b { display: block; font-size: 1.35rem }
pre { background: #f2f5f9; border-radius: 8px; padding: 1rem; overflow: auto; white-space: pre-wrap }
table { border-collapse: collapse; margin-bottom: 1rem } td, th { padding: .2rem .7rem; text-align: right }
tr:nth-child(even) { background: #f2f5f9 }
mark { background: #d6e9ff } @media (max-width: 600px) { .plots { grid-template-columns: 1fr } }
"""


def write_report(run: Path) -> Path:
    """Writes ``run/report.html`` from the files of the run folder. Damaged lines are left out, and counted in the report.

    Returns:
        The path of the report.

    Raises:
        UsageError: if ``report.html`` exists and is not a report.
    """
    from plotly.offline import get_plotlyjs

    path = run / "report.html"
    if path.is_file() and not path.read_bytes().startswith(HEAD.encode()):
        raise UsageError(f"{path} exists and is not a report of internevo: rename it")
    train, damaged = usable_rows(run / "metrics.jsonl", {"step": int, "loss": NUMBER})
    valid, _ = usable_rows(run / "metrics.jsonl", {"step": int, "valid_loss": NUMBER})
    samples, _ = usable_rows(run / "samples.jsonl", {"step": int, "prompt": str, "text": str})
    config, title = _config(run)
    note = f"<p>{damaged} damaged lines of metrics.jsonl are left out.</p>" if damaged else ""
    page = (
        f"{HEAD}{html.escape(title)}</title>"
        f"<meta name='viewport' content='width=device-width, initial-scale=1'><style>{STYLE}</style>"
        f"<script>{get_plotlyjs()}</script></head><body>"
        f"<h1>{html.escape(title)}</h1>{note}{_figures(train, valid)}"
        f"<h2>Training</h2><div class='plots'>{_plots(train, valid)}</div>"
        f"{_memory(run)}{_timeline(run / 'timeline.json')}{_samples(samples)}"
        "<h2>Config</h2><details><summary>the resolved config</summary>"
        f"<pre>{html.escape(config)}</pre></details>"
        "</body></html>"
    )
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with naming(temporary):
        temporary.write_text(page, encoding="utf-8", errors="xmlcharrefreplace")
    temporary.replace(path)
    return path


def _config(run: Path) -> tuple[str, str]:
    """Returns the text of a run's config, and the run's name: that of its folder if the config is missing or damaged."""
    path = run / "config.json"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else "{}"
    try:
        name = json.loads(text)["JOB_NAME"]
    except (ValueError, TypeError, KeyError):
        name = None
    return text, name if isinstance(name, str) else run.resolve().name


def _figures(train: list[dict[str, Any]], valid: list[dict[str, Any]]) -> str:
    """Returns the most important numbers as HTML."""
    if not train:
        return "<p>No step has been trained yet.</p>"
    last = train[-1]
    memory = [value / 2**30 for _, value in _points(train, "memory_peak_max")]
    shown = [
        ("steps", f"{last['step']:,}"),
        ("tokens", _number(last.get("consumed_tokens"), ",")),
        ("last loss", _number(last["loss"], ".4f")),
        ("TGS (median)", _median(train, "tgs", ",.0f")),
        ("TFLOPS (median)", _median(train, "tflops", ".3g")),
        ("peak memory", f"{max(memory):.2f} GiB" if memory else "n/a"),
        ("skipped steps", f"{sum(row.get('skipped') is True for row in train)}"),
    ]
    if valid:
        shown[3:3] = [
            ("validation loss", _number(valid[-1]["valid_loss"], ".4f")),
            ("perplexity", _number(valid[-1].get("valid_ppl"), ".2f")),
        ]
    cells = "".join(f"<div class='figure'><b>{value}</b>{name}</div>" for name, value in shown)
    return f"<div class='figures'>{cells}</div>"


def _number(value: Any, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) else "n/a"


def _median(rows: list[dict[str, Any]], key: str, form: str) -> str:
    values = [value for _, value in _points(rows, key)]
    return _number(statistics.median(values) if values else None, form)


def _points(rows: list[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    """Returns (step, value) of each row that has a number under ``key``."""
    return [(row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float)]


def _plots(train: list[dict[str, Any]], valid: list[dict[str, Any]]) -> str:
    import plotly.graph_objects as go
    import plotly.io

    def series(rows: list[dict[str, Any]], key: str, name: str, scale: float = 1.0) -> Any:
        points = _points(rows, key)
        mode = "lines+markers" if rows is valid else "lines"
        return go.Scatter(x=[step for step, _ in points], y=[value * scale for _, value in points], name=name, mode=mode)

    plots: list[tuple[str, list[Callable[[], Any]], str]] = [
        (
            "Loss",
            [lambda: series(train, "loss", "training"), lambda: series(valid, "valid_loss", "validation")],
            "nats per token",
        ),
        ("Learning rate", [lambda: series(train, "lr", "lr")], ""),
        ("Gradient norm", [lambda: series(train, "grad_norm", "norm")], "before clipping"),
        ("Speed", [lambda: series(train, "tgs", "TGS")], "tokens per device per second"),
        ("Peak memory", [lambda: series(train, "memory_peak_max", "memory", 2**-30)], "GiB, largest rank"),
        (
            "Step time",
            [lambda: series(train, "step_time", "step"), lambda: series(train, "data_time", "waiting for data")],
            "s",
        ),
    ]
    parts = []
    for title, lines, unit in plots:
        figure = go.Figure([line() for line in lines])
        figure.update_layout(
            title=title, xaxis_title="step", yaxis_title=unit, template="plotly_white", height=340,
            margin={"l": 60, "r": 20, "t": 50, "b": 45}, hovermode="x unified", legend={"x": 1, "xanchor": "right", "y": 1},
        )  # fmt: skip
        parts.append(
            plotly.io.to_html(
                figure, include_plotlyjs=False, full_html=False, config={"displaylogo": False, "responsive": True}
            )
        )
    return "".join(f"<div>{part}</div>" for part in parts)


def _timeline(path: Path) -> str:
    """Returns the picture of a pipeline's timeline, if the run has one."""
    if not path.is_file():
        return ""
    try:
        picture = draw(read_object(path))
    except (UsageError, ValueError):
        picture = "<p>timeline.json is damaged, and left out.</p>"
    return f"<h2>Pipeline</h2>{picture}"


def _memory(run: Path) -> str:
    """Returns the pictures of the memory of the rank with the highest peak, and a table of all, if the run has measured it."""
    path = run / "memory.json"
    if not path.is_file():
        return ""
    try:
        ranks = read_object(path).get("ranks")
        if not isinstance(ranks, list) or not all(isinstance(row, dict) and "peak" in row for row in ranks):
            return ""  # written by an older version
        table = peaks_table(ranks)
        most = max(range(len(ranks)), key=lambda rank: ranks[rank]["peak"]["measured"])
        profile = read_object(run / "memory" / f"rank-{most}.json")
        shown = f"{table}{draw_timeline(profile)}{draw_peak(profile)}"
    except (UsageError, ValueError):
        shown = "<p>memory.json, or a file of the folder memory, is damaged or missing, and left out.</p>"
    return f"<h2>Memory of a step</h2>{shown}"


def _samples(samples: list[dict[str, Any]]) -> str:
    if not samples:
        return ""
    shown = "".join(
        f"<p>step {s['step']}</p><pre><mark>{html.escape(s['prompt'])}</mark>{html.escape(s['text'])}</pre>"
        for s in samples[-12:]
    )
    return f"<h2>What the model writes</h2>{shown}"
