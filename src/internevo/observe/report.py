"""report.html: what a run is and how it went, or several runs next to each other. One file, which needs no network."""

from __future__ import annotations

import html
import time
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from ..config.write import check_own
from ..errors import UsageError
from ..storage.jsonfile import read_object, to_json
from ..storage.replace import replace_text
from ..wording import counted
from .curves import axes, figures, timeline
from .memory import draw_peak, draw_timeline, peaks_table
from .page import HEAD, SCRIPT, STYLE
from .rundata import Row, RunData, points
from .timeline import draw
from .units import amount, duration, flops

OPEN_SAMPLES = 2
"""The samples of this many steps are shown; older ones unfold."""


def write_report(run: Path) -> Path:
    """Writes ``run/report.html`` from the files of the run folder. Damaged lines are left out, and counted in the report.

    Returns:
        The path of the report.

    Raises:
        UsageError: if ``report.html`` exists and is not a report.
    """
    data = RunData.read(run)
    note = f"<p>Left out: {counted(data.damaged, 'damaged line')} of metrics.jsonl.</p>" if data.damaged else ""
    drawn = [figure for figure in (*figures([data]), timeline(data)) if figure is not None]
    body = (
        f"{note}{_figures(data)}{_facts(data)}<h2>Training</h2>{_plots(drawn)}"
        f"{_samples(data.samples)}{_memory(run)}{_timeline(run / 'timeline.json')}"
        f"<h2>Config</h2><details><summary>the resolved config</summary><pre>{html.escape(data.config)}</pre></details>"
    )
    return _write(run / "report.html", data.name, body, drawn, [data])


def write_comparison(runs: Sequence[Path], path: Path) -> Path:
    """Writes a page that compares runs: their results, the options in which their configs differ, and their curves.

    Raises:
        UsageError: if ``path`` exists and is not a report.
    """
    data = [RunData.read(run) for run in runs]
    names = [run.name for run in data]
    for run in data:
        if names.count(run.name) > 1:
            run.name = str(run.folder)
    drawn = figures(data)
    damaged = "".join(
        f"<p>Left out: {counted(r.damaged, 'damaged line')} of {html.escape(str(r.folder))}.</p>" for r in data if r.damaged
    )
    body = f"{damaged}<h2>Results</h2>{_results(data)}<h2>Training</h2>{_plots(drawn)}<h2>Configs</h2>{_differences(data)}"
    return _write(path, " · ".join(run.name for run in data), body, drawn, data)


def _write(path: Path, title: str, body: str, drawn: Sequence[dict[str, Any]], runs: Sequence[RunData]) -> Path:
    from plotly.offline import get_plotlyjs

    check_own(path, HEAD, "a report of internevo", chosen=len(runs) > 1)
    values = to_json({"figures": drawn, "axes": [axes(run) for run in runs]}).replace("<", "\\u003c")
    page = (
        f"{HEAD}{html.escape(title)}</title>"
        f"<meta name='viewport' content='width=device-width, initial-scale=1'><style>{STYLE}</style>"
        f"<script>{get_plotlyjs()}</script></head><body><h1>{html.escape(title)}</h1>{body}"
        f"<script>const report = {values};{SCRIPT}</script></body></html>"
    )
    replace_text(path, page, errors="xmlcharrefreplace")
    return path


# Numbers and facts ---------------------------------------------------------------------------------------------------


def _figures(run: RunData) -> str:
    """Returns the most important numbers as HTML."""
    if not run.train:
        return "<p>No step has been trained yet.</p>"
    last, mfu, tflops = run.train[-1], run.median("mfu"), run.median("tflops")
    total = run.options().get("data.total_steps")
    steps = f"{last['step']:,}" + (f" of {total:,}" if isinstance(total, int) and total != last["step"] else "")
    memory = [value / 2**30 for _, value in points(run.train, "memory_peak_max")]
    shown = [
        ("steps", steps),
        ("tokens", amount(last["consumed_tokens"]) if isinstance(last.get("consumed_tokens"), int) else "n/a"),
        ("last loss", _number(last["loss"], ".4f")),
        ("TGS (median)", _number(run.median("tgs"), ",.0f")),
        ("MFU (median)", f"{mfu:.1%}") if mfu is not None else ("speed (median)", "n/a" if tflops is None else flops(tflops)),
        ("peak memory", f"{max(memory):.2f} GiB" if memory else "n/a"),
        ("skipped steps", f"{sum(row.get('skipped') is True for row in run.train)}"),
        ("duration", duration(run.seconds())),
    ]
    if run.valid:
        shown[3:3] = [
            ("validation loss", _number(run.valid[-1]["valid_loss"], ".4f")),
            ("perplexity", _number(run.valid[-1].get("valid_ppl"), ".2f")),
        ]
    cells = "".join(f"<div class='figure'><b>{value}</b>{name}</div>" for name, value in shown)
    return f"<div class='figures'>{cells}</div>"


def _facts(run: RunData) -> str:
    """Returns a table of what was run: model, hardware, versions, command. A run of an older version has none."""
    start, starts = run.start, [event for event in run.events if event["event"] == "start"]
    versions = start.get("versions")
    rows = {
        "model": start.get("model"),
        "hardware": _hardware(start),
        "layout": start.get("layout"),
        "learning rate": start.get("learning rate"),
        "versions": ", ".join(f"{name} {of}" for name, of in versions.items()) if isinstance(versions, dict) else None,
        "commit": start.get("commit"),
        "command": start.get("command"),
        "started": ", ".join(
            time.strftime("%Y-%m-%d %H:%M", time.localtime(e["time"])) + (f" (after step {e['step']})" if e["step"] else "")
            for e in starts[-10:]
        ),
        "run folder": str(run.folder) if start else None,
    }  # fmt: skip
    code = ("command", "commit", "run folder")
    cells = "".join(
        f"<dt>{name}</dt><dd>{'<code>' * (name in code)}{html.escape(str(value))}{'</code>' * (name in code)}</dd>"
        for name, value in rows.items() if value
    )  # fmt: skip
    return f"<dl>{cells}</dl>" if cells else ""


def _hardware(start: Row) -> str | None:
    """Says on what a run was: a GPU for each process, or the processor that all of them share."""
    device, host, processes = (start.get(key) for key in ("device", "host", "processes"))
    if not device:
        return None
    if "cuda" in (start.get("versions") or {}):
        return f"{processes} x {device} ({host})"
    return f"{device} ({host})" + (f", {counted(processes, 'process')}" if isinstance(processes, int) else "")


def _results(runs: Sequence[RunData]) -> str:
    rows = []
    for run in runs:
        last = run.train[-1] if run.train else {}
        best = min((loss for _, loss in points(run.valid, "valid_loss")), default=None)
        memory = [value for _, value in points(run.train, "memory_peak_max")]
        rows.append({
            "run": run.name, "steps": _number(last.get("step"), ","), "tokens": _number(last.get("consumed_tokens"), ","),
            "last loss": _number(last.get("loss"), ".4f"), "best validation loss": _number(best, ".4f"),
            "TGS (median)": _number(run.median("tgs"), ",.0f"),
            "peak memory": f"{max(memory) / 2**30:.2f} GiB" if memory else "n/a", "duration": duration(run.seconds()),
            "parameters": _number(run.start.get("parameters"), ","),
        })  # fmt: skip
    return _table(rows)


def _differences(runs: Sequence[RunData]) -> str:
    """Returns a table of the options whose values are not the same in all configs; the run folders always differ."""
    configs = [run.options() for run in runs]
    keys = dict.fromkeys(key for config in configs for key in config if key != "ckpt.save_ckpt_folder")
    shown = [[to_json(config[key], escaped=False) if key in config else "-" for config in configs] for key in keys]
    rows = [
        {"option": key} | {run.name: value for run, value in zip(runs, values, strict=True)}
        for key, values in zip(keys, shown, strict=True) if len(set(values)) > 1
    ]  # fmt: skip
    return _table(rows) if rows else "<p>The configs are the same.</p>"


def _table(rows: Sequence[dict[str, str]]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in rows[0])
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(value)}</td>' for value in row.values())}</tr>" for row in rows)
    return f"<div class='scroll'><table><tr>{head}</tr>{body}</table></div>"


def _number(value: Any, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) else "n/a"


# Pictures ------------------------------------------------------------------------------------------------------------


def _plots(drawn: Sequence[dict[str, Any]]) -> str:
    """Returns the places of the figures, and the choice of their x axis."""
    if not drawn:
        return ""
    choice = "".join(f"<button data-x='{x}'>{x}</button>" for x in ("step", "tokens", "hours"))
    places = "".join(f"<div class='plot{' wide' * bool(f.get('wide'))}' id='figure-{n}'></div>" for n, f in enumerate(drawn))
    return f"<div class='choice'>x axis: {choice}</div><div class='plots'>{places}</div>"


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
        if profile.get("peak") != ranks[most]["peak"]:  # a later run was killed between the files
            raise ValueError
        shown = f"{table}{draw_timeline(profile)}{draw_peak(profile)}"
    except (UsageError, ValueError):
        shown = "<p>memory.json, or a file of the folder memory, is damaged, missing or of another run, and left out.</p>"
    return f"<h2>Memory of a step</h2>{shown}"


def _samples(samples: list[Row]) -> str:
    """Returns the samples, the newest first."""
    newest_first = sorted(samples, key=lambda sample: -sample["step"])
    parts = []
    for number, (step, of) in enumerate(groupby(newest_first, key=lambda sample: sample["step"])):
        texts = "".join(f"<pre><mark>{html.escape(s['prompt'])}</mark>{html.escape(s['text'])}</pre>" for s in of)
        parts.append(f"<details{' open' * (number < OPEN_SAMPLES)}><summary>step {step:,}</summary>{texts}</details>")
    return f"<h2>What the model writes</h2>{''.join(parts)}" if parts else ""
