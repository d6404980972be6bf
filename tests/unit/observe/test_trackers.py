"""Trackers: what they get; that none delays or ends a run; that a resumed run continues; with real libraries, if installed."""

import errno
import json
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import pytest

from internevo.config import Config
from internevo.config.option import PathText, walk
from internevo.config.run import Monitor
from internevo.observe.background import Background, End, Entry, Ids, Tracked
from internevo.observe.record import StepRecord, ValidRecord
from internevo.observe.trackers import close_trackers, make_trackers
from tests.conftest import tiny

RECORD = StepRecord(
    3, 2.0, 1.5, 0.1, 8, 24, 1.0, 1.0, None, 1.0, 0.5, 1, 1, False, 50.0, {"en": 2.5}, moe={"load": [1.0], "max_load": 2.0}
)


class Fake:
    """A tracker that fails or waits as it is told."""

    name = "fake"

    def __init__(self, fail: Callable[[str], None] = lambda call: None) -> None:
        self.fail, self.got, self.calls = fail, list[int](), list[str]()

    def start(self) -> None:
        self.calls.append("start")
        self.fail("start")

    def write(self, entries: Sequence[Entry]) -> None:
        self.fail("write")
        self.got += [entry.step for entry in entries]

    def close(self, end: End) -> None:
        self.calls.append(end)


def entries(steps: range) -> list[Entry]:
    return [Entry(step, 1.0, {"loss": 1.0}) for step in steps]


def given(tracker: Fake, steps: range, patience: float = 60.0, **options: Any) -> tuple[Background, list[str]]:
    said = list[str]()
    background = Background(tracker, said.append, **options)
    for entry in entries(steps):
        background.put(entry)
    close_trackers([background], "finished", patience)
    return background, said


def test_a_tracker_gets_every_entry_in_order() -> None:
    tracker = Fake()
    _, said = given(tracker, range(500))
    assert tracker.got == list(range(500)) and tracker.calls == ["start", "finished"] and said == []
    empty = Fake()
    given(empty, range(0))
    assert empty.calls == []


@pytest.mark.parametrize("call", ["start", "write"])
def test_a_tracker_that_comes_back_gets_what_waited(call: str) -> None:
    failures = 3

    def fail(now: str) -> None:
        nonlocal failures
        if now == call and failures:
            failures -= 1
            raise OSError("no\nroute")

    tracker, said, done = Fake(fail), list[str](), threading.Event()
    background = Background(tracker, said.append, retry=0.001, pause=0.001)
    for entry in entries(range(50)):
        background.put(entry)
    while tracker.got != list(range(50)):
        done.wait(0.001)
    close_trackers([background], "stopped")
    assert said == ["fake: no route. The run goes on; fake is tried again every 0 s"]


def test_a_tracker_that_is_down_loses_entries_and_says_so_once() -> None:
    def fail(call: str) -> None:
        raise ConnectionError

    begin = time.monotonic()
    tracker = Fake(fail)
    _, said = given(tracker, range(30), most=10, retry=1000.0)
    assert [line.partition(".")[0].partition(";")[0] for line in said] == ["fake: ConnectionError", "fake: lost 30 entries"]
    assert tracker.got == [] and time.monotonic() - begin < 500


def test_a_tracker_that_hangs_is_left_behind() -> None:
    never = threading.Event()

    def hang(call: str) -> None:
        never.wait(600)

    background, said = given(Fake(hang), range(30), patience=0.05, most=10)
    assert background.thread.daemon and "fake does not answer" in said[0] and "fake: lost 30 entries" in said[1]
    never.set()


def run_of(folder: Path, last_step: int = 0, identity: str = "0123456789abcdef") -> Tracked:
    folder.mkdir(exist_ok=True)
    config = {f"section.key{number}": number for number in range(150)}
    return Tracked(folder, "job", identity, last_step, config | {"long": "x" * 9000})


def test_ids_are_those_of_the_run(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    Ids(run).keep("wandb", "a")
    assert Ids(run).get("wandb") == "a" and Ids(run).get("mlflow") is None
    assert Ids(run_of(tmp_path, identity="another")).get("wandb") is None
    (tmp_path / "trackers.json").write_text("{")
    assert Ids(run).get("wandb") is None


def test_ids_that_an_earlier_version_has_written_are_read(tmp_path: Path) -> None:
    run = run_of(tmp_path)
    (tmp_path / "trackers.json").write_text(json.dumps({"run": run.identity, "wandb": "a"}))
    ids = Ids(run)
    ids.keep("mlflow", "b")
    assert ids.get("wandb") == Ids(run).get("wandb") == "a" and Ids(run).get("mlflow") == "b" and ids.get("run") is None


def test_a_full_disk_makes_no_tracker_get_anything_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("internevo.observe.background.replace_json", full)
    said = list[str]()
    tracker, ids = Fake(), Ids(run_of(tmp_path), said.append)
    tracker.start = lambda: ids.keep("fake", "a")  # type: ignore[method-assign]
    _, of_tracker = given(tracker, range(50), ids=ids, retry=0.001, pause=0.001)
    assert tracker.got == list(range(50)) and tracker.calls == ["finished"] and of_tracker == []
    assert len(said) == 1 and said[0].startswith(f"{tmp_path / 'trackers.json'} cannot be written: No space left on device")


def is_path(field: Any) -> bool:
    return any(part == PathText for part in (field.annotation, *get_args(field.annotation))) or any(
        part in field.metadata for part in get_args(PathText)[1:]
    )


def test_a_run_that_is_taken_elsewhere_sends_no_step_again(tmp_path: Path) -> None:
    keys = {key for key, field, *_ in walk(Config.model_validate(tiny())) if is_path(field)}
    assert {"data.train_folder", "data.valid_folder", "data.tokenizer_path", "model.from_hf"} <= keys
    places = [{**dict.fromkeys(keys, at), "data.mixture": [{"folder": at, "weight": 1.0}]} for at in ("/here", "/there")]
    assert len(resumed(tmp_path, range(1, 3), **places[0])) == 5
    assert resumed(tmp_path, range(2, 3), **places[1]) == []
    assert resumed(tmp_path, range(2, 3), **places[1] | {"data.mixture": [{"folder": "/there", "weight": 2.0}]}) != []


def resumed(folder: Path, steps: range, **config: object) -> list[Entry]:
    """A process of a run that takes these steps, evaluates every two, and shows two samples. Returns what its tracker got."""
    run = run_of(folder, steps.start - 1)
    run.config |= config
    tracker, got = Fake(), list[Entry]()
    tracker.write = got.extend  # type: ignore[method-assign, assignment]
    background = Background(tracker, print, Ids(run))
    for step in steps:
        background.put(Entry(step, 1.0, {"loss": 1.0 * step}))
        if step % 2 == 0:
            background.put(Entry(step, 1.0, {"valid": 2.0 * step}))
            background.put(Entry(step, 1.0, samples=[("a", str(step))]))
            background.put(Entry(step, 1.0, samples=[("b", str(step))]))
    close_trackers([background], "stopped")
    return got


def names(entries: Sequence[Entry]) -> list[tuple[int, str]]:
    return [(entry.step, name) for entry in entries for name in (*entry.scalars, *(prompt for prompt, _ in entry.samples))]


def test_steps_that_a_resumed_run_repeats_are_not_sent_again(tmp_path: Path) -> None:
    """Neither after a kill between a step and its evaluation."""
    first = resumed(tmp_path, range(1, 5))
    assert names(first) == [
        (1, "loss"), (2, "loss"), (2, "valid"), (2, "a"), (2, "b"), (3, "loss"), (4, "loss"), (4, "valid"), (4, "a"), (4, "b"),
    ]  # fmt: skip
    known = json.loads((tmp_path / "trackers.json").read_text())
    del known["sent"]["fake"]["valid"], known["sent"]["fake"]["samples"]
    (tmp_path / "trackers.json").write_text(json.dumps(known))
    again = resumed(tmp_path, range(3, 7), **{"ckpt.keep_last": 9})
    wanted = [(4, "valid"), (4, "a"), (4, "b"), (5, "loss"), (6, "loss"), (6, "valid"), (6, "a"), (6, "b")]
    assert names(again) == wanted
    assert names(resumed(tmp_path, range(5, 7))) == []
    other = resumed(tmp_path, range(5, 7), **{"adam.lr": 1.0})  # which have other numbers
    assert names(other) == wanted[3:]


def test_what_a_tracker_is_told() -> None:
    entry = Entry.of_step(RECORD)
    assert (entry.step, entry.time) == (3, 50.0)
    assert entry.scalars["train/loss"] == 2.0 and entry.scalars["train/loss/en"] == 2.5 and entry.scalars["moe/max_load"] == 2.0
    assert "moe/load" not in entry.scalars and "speed/mfu" not in entry.scalars
    valid = Entry.of_evaluation(ValidRecord(4, 2.0, float("inf"), 1.0, {"en": 2.5}))
    assert valid.finite() == {"valid/loss": 2.0, "valid/loss/en": 2.5}


def track(folder: Path, monitor: dict[str, Any], tensorboard: bool = False, end: End = "finished") -> list[str]:
    """A run of two steps with an evaluation and a sample, which is resumed after step 1. Returns the warnings."""
    said = list[str]()
    for last_step in (0, 1):
        trackers = make_trackers(Monitor(**monitor), run_of(folder, last_step), tensorboard, said.append)
        for step in range(last_step + 1, 3):
            for tracker in trackers:
                tracker.put(Entry(step, 1000.0 + step, {"train/loss": 10.0 * step, "train/grad_norm": float("nan")}))
                tracker.put(Entry(step, 1000.0 + step, {"valid/loss": 20.0 * step}))
                tracker.put(Entry(step, 1000.0 + step, samples=[("a prompt", " a text")]))
        close_trackers(trackers, end if last_step else "stopped", 300)
    return said


def test_tensorboard(tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert track(tmp_path, {}, tensorboard=True) == []
    found = reader.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in found.Scalars("train/loss")] == [(1, 10.0), (2, 20.0)]
    assert any("a_prompt" in name or "a prompt" in name for name in found.Tags()["tensors"])


@pytest.mark.parametrize(("end", "state"), [("finished", "FINISHED"), ("stopped", "KILLED"), ("failed", "FAILED")])
def test_mlflow(tmp_path: Path, end: End, state: str) -> None:
    mlflow, _ = pytest.importorskip("mlflow"), pytest.importorskip("sqlalchemy")
    address = f"sqlite:///{tmp_path}/mlflow.db"
    assert track(tmp_path, {"trackers": "mlflow", "mlflow": {"tracking_uri": address, "experiment": "tests"}}, end=end) == []
    client = mlflow.MlflowClient(tracking_uri=address)
    (run,) = client.search_runs([client.get_experiment_by_name("tests").experiment_id])
    assert run.info.status == state and run.info.run_name == "job" and run.data.params["section.key149"] == "149"
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "train/loss")] == [(1, 10.0), (2, 20.0)]
    assert "train/grad_norm" not in run.data.metrics and run.data.metrics["valid/loss"] == 40.0


class Recorded:
    """Stands for a library: every call of any of its functions returns it, and is written down."""

    def __init__(self) -> None:
        self.calls = list[tuple[str, tuple[Any, ...], dict[str, Any]]]()
        self.info, self.run_id, self.experiment_id = self, "1", "2"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)

        def call(*arguments: Any, **options: Any) -> Recorded:
            self.calls.append((name, arguments, options))
            return self

        return call

    def of(self, name: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        return [(arguments, options) for called, arguments, options in self.calls if called == name]


@pytest.mark.parametrize(
    ("end", "code", "state"), [("finished", 0, "FINISHED"), ("stopped", 255, "KILLED"), ("failed", 1, "FAILED")]
)
def test_libraries_are_told_each_step_once_and_how_the_run_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: End, code: int, state: str
) -> None:
    """As their functions are called; the tests of the real libraries say whether that is right."""
    libraries = {name: Recorded() for name in ("wandb", "mlflow", "trackio")}
    for name, library in libraries.items():
        monkeypatch.setitem(sys.modules, name, library)
    monkeypatch.setitem(sys.modules, "mlflow.entities", libraries["mlflow"])
    assert track(tmp_path, {"trackers": list(libraries)}, end=end) == []
    wandb, mlflow, trackio = libraries.values()
    assert [options for _, options in wandb.of("finish")] == [{"exit_code": 255}, {"exit_code": code}]
    assert [values["train/loss"] for (values,), _ in wandb.of("log") if "train/loss" in values] == [10.0, 20.0]
    assert [arguments[1] for arguments, _ in mlflow.of("set_terminated")] == ["KILLED", state]
    assert [of[1] for of, _ in mlflow.of("Metric") if of[0] == "train/loss"] == [10.0, 20.0]
    assert [of[0]["train/loss"] for of, _ in trackio.of("log") if "train/loss" in of[0]] == [10.0, 20.0]
    assert len(trackio.of("finish")) == 2


def records_of(data: bytes, header: int = 7, block: int = 32_768) -> Iterator[bytes]:
    """The records of wandb's file, which is a log as LevelDB writes it: checksum, length and kind before each piece of one."""
    at, record = header, b""
    while at + 7 <= len(data):
        if block - at % block < 7:
            at += block - at % block
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record, at = record + data[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


def test_wandb(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    assert track(tmp_path, {"trackers": ["wandb"], "wandb": {"mode": "offline", "project": "tests", "tags": ["a"]}}) == []
    records, end = list[Any](), time.monotonic() + 60
    while sum(record.HasField("exit") for record in records) < 2 and time.monotonic() < end:  # its process writes the end late
        records = []
        for path in sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb")):
            for data in records_of(path.read_bytes()):
                records.append(Record())
                records[-1].ParseFromString(data)
        time.sleep(0.1)
    assert [record.exit.exit_code for record in records if record.HasField("exit")] == [255, 0]  # as after Ctrl-C; finished
    runs = {(r.run.run_id, r.run.project, r.run.display_name) for r in records if r.run.run_id}
    rows = [{item.key or item.nested_key[0]: json.loads(item.value_json) for item in r.history.item} for r in records]
    assert runs == {("0123456789abcdef", "tests", "job")}
    assert [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row] == [(1, 10.0), (2, 20.0)]


def test_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio")
    assert track(tmp_path, {"trackers": ["trackio"], "trackio": {"project": "tests"}}) == []
    (run,) = trackio.Api().runs("tests")
    assert run.name == "job-012345"
    with sqlite3.connect(tmp_path / "trackio" / "tests.db") as database:
        rows = [(step, json.loads(values)) for step, values in database.execute("select step, metrics from metrics")]
    assert sorted((step, row["train/loss"]) for step, row in rows if "train/loss" in row) == [(1, 10.0), (2, 20.0)]
