"""Every script in benchmarks/ runs, in its smallest form. What they measure is not checked."""

import gzip
import json
import shutil
import sys
from itertools import islice
from pathlib import Path

import pytest

from internevo.parallel.world import join
from tests.conftest import ROOT


@pytest.fixture(autouse=True)
def as_a_script(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts import each other by name."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setenv("INTERNEVO_DEVICE", "cpu")


def test_training_and_checkpoints(tmp_path: Path) -> None:
    import checkpoint
    import ours

    tiny = ours.SHAPES["tiny"]
    with join() as world:
        assert len(list(islice(ours.steps_of(world, tiny, "float32"), 3))) == 3
        assert min(checkpoint.measure(world, tiny, 1, tmp_path)) > 0


def test_transformers() -> None:
    import vs_transformers

    times, memory = vs_transformers.compare("tiny", "bf16", steps=1, rounds=1, threads=1)
    assert set(times) == set(memory) == {"theirs", "eager", "compiled"}
    assert all(len(steps) == 1 for steps in times.values()) and min(memory.values()) > 0.1


def test_strategies_of_pytorch() -> None:
    import parallel

    assert min(parallel.compare("msp", "tiny", steps=1, rounds=1)) > 0


def test_turns_show_which_rank_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    import turns

    monkeypatch.setattr(turns, "PATIENCE", 1.0)
    code = """
import os, sys
for _ in sys.stdin:
    print(1.0, flush=True)
    if os.environ["RANK"] == "1":
        sys.exit("no memory is left")
"""
    with (
        pytest.raises(SystemExit, match=r"failed\nrank 1: no memory is left\n$"),
        turns.Program([sys.executable, "-c", code], ranks=3) as program,
    ):
        assert program.step() == 1.0
        program.step()
    assert all(process.poll() is not None for process in program.processes)


def test_turns_show_that_a_program_failed_at_its_end() -> None:
    import turns

    code = "import sys; [print(1.0, flush=True) for _ in sys.stdin]; print(2.0, flush=True); sys.exit('not saved')"
    with pytest.raises(SystemExit, match="rank 0: not saved"), turns.Program([sys.executable, "-c", code]) as program:
        assert program.step() == 1.0


def test_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import data

    monkeypatch.setattr(data, "library_texts", lambda: ["def f(x):\n    return x\n" * n for n in range(1, 60)])
    data.packing(tmp_path / "packing", files=2, documents=300)
    data.tokenizing(tmp_path / "tokenizing", copies=1, rounds=1)
    data.streaming(tmp_path / "streaming", copies=1, rounds=1, first=0)
    assert len(capsys.readouterr().out.splitlines()) == 5


@pytest.mark.parametrize("family", ["LLAMA2", "INTERNLM2", "MIXTRALMOE"])
def test_conversion(tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str) -> None:
    import convert

    convert.make(tmp_path / "source", family, 0.08, width=512)
    convert.compare(tmp_path / "source", tmp_path / "target", 1, {})
    assert capsys.readouterr().out.split()[:2] == ["cp", "-r"]
    shutil.rmtree(tmp_path / "source")


def test_timeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import timeline

    events = [
        {"ph": "X", "name": name, "tid": thread, "ts": at, "dur": 2000.0}
        for name, thread, at in [("aten::mm", 1, 0.0), ("aten::mm", 1, 3000.0), ("gloo:all_gather", 2, 1000.0)]
    ]
    trace, picture = tmp_path / "trace.json.gz", tmp_path / "timeline.svg"
    trace.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    monkeypatch.setattr("sys.argv", ["timeline.py", str(trace), "--out", str(picture)])
    timeline.main()
    assert timeline.hidden(timeline.lanes(trace)) == pytest.approx(0.5)
    assert picture.read_text().count("<title>") == 3


def test_pipelines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import pipeline

    def table(*options: str) -> list[list[str]]:
        monkeypatch.setattr("sys.argv", [str(ROOT / "benchmarks" / "pipeline.py"), "--rounds", "1", *options])
        pipeline.main()
        return [line.split() for line in capsys.readouterr().out.splitlines()[1:]]

    rows = table("--seconds", "0.001", "--out", str(tmp_path))
    assert [row[0] for row in rows] == ["1F1B", "interleaved", "ZBH1", "ZBV"]
    # The activations are counted, and do not depend on time. Those of interleaved stages are the formula's 2 (p - 1) + p + 1
    # passes through half of the layers of a rank.
    assert [float(row[-1]) for row in rows] == [4.0, 5.5, 4.0, 4.0]
    assert len(list(tmp_path.glob("*.svg"))) == 4
    assert [row[0] for row in table("--speed", "--shape", "tiny", "--steps", "1")] == ["1", "median"]


def test_experts(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import experts

    monkeypatch.setattr("sys.argv", [str(ROOT / "benchmarks" / "experts.py"), "--rounds", "1"])
    experts.main()  # the ranks also compare the two results
    assert [line.split()[:2] for line in capfd.readouterr().out.splitlines()] == [["one", "process"], ["4", "processes"]]


def test_no_script_is_missing_in_this_file() -> None:
    names = {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
    assert names == {
        "bench",
        "checkpoint",
        "convert",
        "data",
        "experts",
        "gpu",
        "ours",
        "parallel",
        "pictures",  # needs Chromium
        "pipeline",
        "plan",  # in tests/unit/planner, as are the next two
        "plan_pictures",
        "published",
        "timeline",
        "turns",
        "vs_transformers",
    }
