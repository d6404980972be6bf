"""Evaluation and samples come after the checkpoint of their step, and are done once, whatever ends a process of the run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from internevo.config import Config, validate
from internevo.errors import InternEvoError
from internevo.text.tokenizer import train_bpe
from internevo.train import between
from internevo.train.run import train
from tests.conftest import tiny

TIMES = ("time", "tgs", "tflops", "mfu", "step_time", "data_time", "memory_peak", "memory_peak_max")


def rows(run: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The rows of a file of a run, without what depends on the clock."""
    found = [json.loads(line) for line in (run / name).read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in found]


def contents(run: Path) -> dict[str, bytes]:
    """Path -> bytes of the files of a run, but for its logs and its lock."""
    files = (path for path in run.rglob("*") if path.is_file() and path.suffix not in (".log", ".lock"))
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in files}


MakeConfig = Callable[..., Config]


@pytest.fixture
def make(tmp_path: Path, dataset: Path) -> MakeConfig:
    """Returns the config of a run of 6 steps with evaluation, samples and checkpoints."""
    tokenizer = train_bpe(["abc abc"], 260, tmp_path / "tokenizer")

    def made(name: str, **changes: Any) -> Config:
        values = {
            "data__train_folder": str(dataset), "data__valid_folder": str(dataset), "data__valid_every": 2,
            "data__valid_max_rows": 4, "data__total_steps": 6, "data__tokenizer_path": str(tokenizer),
            "data__global_batch_size": 2, "model__vocab_size": 260, "monitor__sample_prompts": ["abc", "b"],
            "monitor__sample_every": 4, "monitor__sample_tokens": 2, "ckpt__save_ckpt_folder": str(tmp_path / name),
            "ckpt__checkpoint_every": 3,
        }  # fmt: skip
        return validate(tiny(**{**values, **changes}))

    return made


def saved(run: Path) -> list[int]:
    return sorted(int(path.parent.name[5:]) for path in run.glob("checkpoints/step-*/manifest.json"))


@pytest.mark.parametrize("asked", [3, 5])
def test_a_stopped_run_saves_at_once_and_leaves_the_rest_to_the_next_process(
    make: MakeConfig, monkeypatch: pytest.MonkeyPatch, asked: int
) -> None:
    """After step 4, in which evaluation and samples are due, and 6, the last. All rows become those of a run nobody stops."""
    whole, stopped = train(make("whole")), make("stopped")
    original = between.Between.__call__

    def not_after_the_stop(self: between.Between, step: int, *rest: Any) -> None:
        assert step <= asked
        original(self, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(between.Between, "__call__", not_after_the_stop)
        run = train(stopped, lambda record: record.step == asked)
    assert saved(run)[-1] == asked + 1
    assert train(stopped) == run
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert rows(run, name) == rows(whole, name)
    state, wanted = (json.loads((r / "checkpoints/step-00000006/state.json").read_text()) for r in (run, whole))
    assert {**state, "run": ""} == {**wanted, "run": ""}


@pytest.mark.parametrize("step", [4, 6])
def test_an_evaluation_that_fails_loses_no_checkpoint_and_is_done_again(
    make: MakeConfig, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    whole, config = train(make("whole", ckpt__checkpoint_every=2)), make("failing", ckpt__checkpoint_every=2)

    def fail(self: between.Between, number: int, observers: object) -> None:
        if number == step:
            raise InternEvoError("the disk of the validation data is gone")
        original(self, number, observers)  # type: ignore[arg-type]

    original = between.Between._evaluate
    with monkeypatch.context() as patch:
        patch.setattr(between.Between, "_evaluate", fail)
        with pytest.raises(InternEvoError, match="is gone"):
            train(config)
    run = config.run_folder
    assert saved(run)[-1] == step
    train(config)
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert rows(run, name) == rows(whole, name)


def test_a_start_that_trains_nothing_leaves_the_record_as_it_is(
    make: MakeConfig, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = train(make("run", ckpt__checkpoint_every=6))
    before = contents(run)
    other = train_bpe(["xyz xyz"], 259, tmp_path / "other")
    for changes in ({}, {"data__total_steps": 2, "adam__lr": 0.5, "data__valid_every": 1, "data__tokenizer_path": str(other)}):
        train(make("run", ckpt__checkpoint_every=6, **changes))
        assert "nothing to train: step 6 is done" in capsys.readouterr().out
        assert contents(run) == before


def test_batches_that_are_left_out_at_the_end_belong_to_a_run_that_is_done(
    make: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"data__valid_every": 3, "data__skip_batches": "1,4-5"}
    run = train(make("run", **changes))
    said = capsys.readouterr().out
    assert "done: 6 of 6 steps, of which data.skip_batches left out 3" in said and "stopped" not in said
    assert [row["step"] for row in rows(run) if "loss" in row] == [1, 3, 4]
    assert [row["step"] for row in rows(run) if "valid_loss" in row] == [3, 4]
    assert {row["step"] for row in rows(run, "samples.jsonl")} == {4} and saved(run) == [3, 4]
    before = contents(run)
    train(make("run", **changes))
    assert "nothing to train" in capsys.readouterr().out and contents(run) == before
    train(make("run", **changes, data__total_steps=8))
    assert [row["step"] for row in rows(run) if "loss" in row] == [1, 3, 4, 7, 8]


def test_a_run_whose_batches_are_all_left_out_says_so(make: MakeConfig, capsys: pytest.CaptureFixture[str]) -> None:
    train(make("run", data__skip_batches="0-5"))
    assert "nothing to train: data.skip_batches leaves out every batch" in capsys.readouterr().out
