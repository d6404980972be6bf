"""The figures of a report, what is compared, and the page in a real browser."""

import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internevo import cli
from internevo.errors import UsageError
from internevo.observe.report import _hardware, write_comparison, write_report
from internevo.observe.rundata import smooth, thin

SPIKE, SKIPPED, RESUMED = 40, 50, 60
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def write_run(
    folder: Path, name: str = "a </script> run", steps: int = 100, lr: float = 0.1, seconds: float = 1.0, first: float = 1.0
) -> Path:
    """A run with a spike, a skipped step and a resume."""
    folder.mkdir()
    facts = {
        "model": "LLAMA2, 5 parameters",
        "device": "a <GPU>",
        "processes": 2,
        "host": "h",
        "versions": {"torch": "2.13", "cuda": "13.0"},
        "command": "internevo train 'a b'",
        "parameters": 5,
    }
    rows = [
        {
            "step": step, "loss": None if step == SKIPPED else 9 / (1 + lr * step), "grad_norm": 1e9 if step == SPIKE else 0.5,
            "lr": lr, "consumed_tokens": 10 * step, "tgs": 100.0, "tflops": 0.002, "mfu": None, 
            "step_time": first if step == 1 else seconds,
            "data_time": 0.1, "memory_peak_max": 2**30, "skipped": step == SKIPPED, "time": 1000.0 + 3600 * step,
            "loss_by_type": {"en": 1.0, "cn": 2.0},
            "moe": {"load": [0.4, 0.3, 0.2, 0.1], "max_load": 1.6, "dropped": 0.0, "entropy": 1.0},
        }
        for step in range(1, steps + 1)
    ]  # fmt: skip
    valid = [{"step": step, "valid_loss": 3.0, "valid_ppl": math.exp(3.0), "time": 1000.0 + 3600 * step} for step in (50, 100)]
    events = [
        {"step": 0, "time": 1000.0, "event": "start", **facts}, {"step": 50, "time": 2000.0, "event": "save", "seconds": 1.0},
        {"step": RESUMED, "time": 1001.0 + 3600 * RESUMED, "event": "start", **facts},
    ]  # fmt: skip
    samples = [{"step": step, "prompt": f"prompt {step} ", "text": "<i>"} for step in (10, 30, 20)]
    for file, of in (("metrics", rows + valid), ("events", events), ("samples", samples)):
        (folder / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of))
    (folder / "config.json").write_text(
        json.dumps({"JOB_NAME": name, "adam": {"lr": lr, "eps": 1}, "data": {"total_steps": 200}})
    )
    return folder


def figures(page: str) -> dict[str, dict[str, Any]]:
    """The figures that a page draws, by title."""
    (text,) = re.findall(r"<script>const report = (.*?);\n// Draws", page, re.S)
    drawn = {figure["layout"]["title"]["text"]: figure for figure in json.loads(text)["figures"]}
    assert [f"id='figure-{n}'" in page for n in range(len(drawn) + 1)] == [True] * len(drawn) + [False]
    return drawn


def test_the_report_shows_what_the_run_was_and_did(tmp_path: Path) -> None:
    page = write_report(write_run(tmp_path / "run")).read_text()
    drawn = figures(page)
    assert set(drawn) == {
        "Loss", "Loss by dataset", "Gradient norm", "Throughput", "Learning rate", "Peak memory", "Step time and data time",
        "Largest load of an expert", "Entropy of the routers", "Dropped choices of experts", "Load of each expert",
        "What happened when",
    }  # fmt: skip
    for text in (
        "LLAMA2, 5 parameters",
        "2 x a &lt;GPU&gt; (h)",
        "internevo train &#x27;a b&#x27;",
        "100 of 200",
        "2 GFLOPS",
        "1.00k",
    ):
        assert text in page, text
    assert page.index("prompt 30") < page.index("prompt 20") < page.index("prompt 10")
    assert page.count("</script>") == 2  # a name with it in it ends no script


def test_a_spike_does_not_ruin_the_axis_of_the_norm(tmp_path: Path) -> None:
    figure = figures(write_report(write_run(tmp_path / "run")).read_text())["Gradient norm"]
    axis = figure["layout"]["yaxis"]
    low, high = (10**end for end in axis["range"])
    assert axis["type"] == "log" and 0.2 < low < 0.5 < high < 2 and any(low < tick < high for tick in axis["tickvals"])
    assert [(line["x"], line["text"]) for line in figure["data"] if "text" in line] == [([SPIKE], ["1e+09"])]


def test_a_slow_step_leaves_no_frame(tmp_path: Path) -> None:
    figure = figures(write_report(write_run(tmp_path / "run", first=60.0)).read_text())["Step time and data time"]
    low, high = figure["layout"]["yaxis"]["range"]
    assert (low, high) == (0, pytest.approx(1.2))
    assert all(low <= value <= high for line in figure["data"] for value in line["y"])
    assert [(line["x"], line["text"]) for line in figure["data"] if "text" in line] == [([1], ["60 s"])]


def test_the_slowest_of_several_runs_has_its_place_in_the_frame(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a", "a"), write_run(tmp_path / "b", "b", steps=5, seconds=9.0, first=9.0)]
    drawn = figures(write_comparison(runs, tmp_path / "all.html").read_text())["Step time and data time"]
    assert drawn["layout"]["yaxis"]["range"] == [0, pytest.approx(10.8)] and len(drawn["data"]) == 4


def test_the_legend_of_a_comparison_is_below_the_title_of_the_axis(tmp_path: Path) -> None:
    """It has its place at the edge of the figure; in heights of the plot area, which shrinks for it, it was on the title."""
    runs = [write_run(tmp_path / f"run-{n}", f"a-long-name-{n}", steps=3) for n in range(6)]
    for number in (2, 6):
        for figure in figures(write_comparison(runs[:number], tmp_path / f"{number}.html").read_text()).values():
            legend = figure["layout"]["legend"]
            assert (legend["yref"], legend["y"], legend["yanchor"]) == ("container", 0, "bottom")
            assert figure["layout"]["height"] == (320 if number < 5 else 360)


@pytest.mark.parametrize(
    ("processes", "versions", "said"),
    [
        (2, {"torch": "2.13"}, "EPYC, 2 cores (h), 2 processes"),
        (1, None, "EPYC, 2 cores (h), 1 process"),
        (8, {"cuda": "13.0"}, "8 x EPYC, 2 cores (h)"),
    ],
)
def test_processes_on_one_processor_do_not_make_it_several(processes: int, versions: dict[str, str] | None, said: str) -> None:
    assert _hardware({"device": "EPYC, 2 cores", "host": "h", "processes": processes, "versions": versions}) == said
    assert _hardware({}) is None


def test_events_are_on_the_axes(tmp_path: Path) -> None:
    drawn = figures(write_report(write_run(tmp_path / "run")).read_text())
    shapes = {(shape["x0"], shape["line"]["dash"]) for shape in drawn["Loss"]["layout"]["shapes"]}
    assert shapes == {(50, "dot"), (RESUMED, "dash"), (SKIPPED, "solid")}
    kinds = {line["name"]: len(line["x"]) for line in drawn["What happened when"]["data"]}
    assert kinds == {"start": 2, "save": 1, "evaluation": 2, "skipped": 1}
    raw, averaged = drawn["Loss"]["data"][:2]
    assert raw["opacity"] < 0.5 and len(raw["x"]) == len(averaged["x"]) == 99 and SKIPPED not in raw["x"]


def test_routing_is_a_heat_map(tmp_path: Path) -> None:
    (heat,) = figures(write_report(write_run(tmp_path / "run")).read_text())["Load of each expert"]["data"]
    assert heat["type"] == "heatmap" and [row[0] for row in heat["z"]] == pytest.approx([1.6, 1.2, 0.8, 0.4])


def test_runs_are_compared(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "x", "x"), write_run(tmp_path / "y", "y", 80, 0.2), write_run(tmp_path / "z", "y")]
    page = write_comparison(runs, tmp_path / "all.html").read_text()
    names = ["x", str(tmp_path / "y"), str(tmp_path / "z")]
    assert [line["name"] for line in figures(page)["Learning rate"]["data"]] == names
    assert "<td>adam.lr</td><td>0.1</td><td>0.2</td><td>0.1</td>" in page and "<td>adam.eps</td>" not in page
    assert [re.search(rf"<td>{name}</td><td>(\d+)</td>", page)[1] for name in names] == ["100", "80", "100"]  # type: ignore[index]
    (tmp_path / "mine.html").write_text("mine")
    with pytest.raises(UsageError, match="is not a report of internevo"):
        write_comparison(runs, tmp_path / "mine.html")


@pytest.mark.usefixtures("exits_in_process")
def test_the_command_compares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        write_run(tmp_path / name, name)
    for arguments, code, said in (
        (["a", "b"], 0, "comparison.html\n"), (["a", "b", "--output", "c.html"], 0, "c.html\n"), (["a"], 0, "a/report.html\n"),
        (["a", "--output", "c.html"], 2, "--output is for a comparison"), (["a", "none"], 2, "none does not exist"),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as caught:
            cli.main(["report", *arguments])
        out = capsys.readouterr()
        assert (caught.value.code or 0) == code and said in out.out + out.err
    assert (tmp_path / "comparison.html").is_file() and (tmp_path / "c.html").is_file()


points = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=400).map(lambda values: list(enumerate(values)))


@given(points)
def test_thinning_keeps_the_extremes_and_the_order(values: list[tuple[int, float]]) -> None:
    kept = thin(values, most=20)
    assert len(kept) <= 20 or len(values) <= 20
    assert kept == sorted(kept) and set(kept) <= set(values)
    assert min(v for _, v in kept) == min(v for _, v in values) and max(v for _, v in kept) == max(v for _, v in values)


@given(points)
def test_smoothing_stays_between_the_extremes(values: list[tuple[int, float]]) -> None:
    numbers = [value for _, value in values]
    assert all(min(numbers) - 1e-6 <= value <= max(numbers) + 1e-6 for _, value in smooth(values))
    assert [value for _, value in smooth([(step, 3.0) for step, _ in values])] == pytest.approx([3.0] * len(values))


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium on this machine")
@pytest.mark.parametrize("several", [False, True])
def test_a_browser_draws_every_figure_without_an_error(tmp_path: Path, several: bool) -> None:
    run = write_run(tmp_path / "run")
    path = write_comparison([run, write_run(tmp_path / "b")], tmp_path / "c.html") if several else write_report(run)
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=8000"]
    assert BROWSER is not None
    done = subprocess.run([BROWSER, *options, "--dump-dom", path.as_uri()], capture_output=True, text=True, timeout=300)
    assert not re.findall(r".*CONSOLE.*", done.stderr)
    places = re.split(r"<div class=\"plot[^>]*id=\"figure-", done.stdout)[1:]
    assert len(places) == len(figures(path.read_text())) and all('class="main-svg"' in place for place in places)
    assert 'class="chosen">step' in done.stdout or re.search(r'<button data-x="step" class="chosen"', done.stdout)
