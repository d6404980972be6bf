"""A run folder belongs to one run: nothing of it is lost by other runs, second starts, renamed folders, or divergence."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from internevo.observe.metrics import usable_rows
from tests.conftest import WriteConfig, metrics, run
from tests.pool import Pool

ENDLESS = ("data.total_steps=100000", "lr_scheduler.total_steps=100000")


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def identity(folder: Path, step: int) -> list[str]:
    """The identity of the run in the state and in the manifest of a checkpoint."""
    checkpoint = folder / "checkpoints" / f"step-{step:08d}"
    return [json.loads((checkpoint / name).read_text())["run"] for name in ("state.json", "manifest.json")]


def test_only_the_run_itself_continues_in_its_folder(pool: Pool, tmp_path: Path, config: WriteConfig) -> None:
    path, folder = config("run", ckpt__checkpoint_every=1, ckpt__keep_last=2), tmp_path / "run"
    pool.train(path, 1, "data.total_steps=4")
    rows = (folder / "metrics.jsonl").read_text()
    (name,) = set(identity(folder, 4))
    assert name and identity(folder, 3) == [name, name]
    for change in ("ckpt.auto_resume=False", "ckpt.enable_save_ckpt=False"):
        done = run("train", path, change, "data.total_steps=1", "--nproc", 1 + change.startswith("ckpt.auto"), code=2)
        assert f"the newest in {folder}/checkpoints/step-00000004" in done.stderr and change in done.stderr
    assert (folder / "metrics.jsonl").read_text() == rows and checkpoints(folder) == ["step-00000003", "step-00000004"]

    moved = tmp_path / "elsewhere"  # the identity moves with the run, and the manifest says the step
    shutil.copytree(folder, moved)
    shutil.copytree(moved / "checkpoints" / "step-00000003", moved / "checkpoints" / "step-0000002b")
    (moved / "checkpoints" / "step-00000004").rename(moved / "checkpoints" / "step-00000100")
    pool.train(path, 2, f"ckpt.save_ckpt_folder={moved}", "data.total_steps=6")
    assert checkpoints(moved) == ["step-00000005", "step-00000006", "step-0000002b", "step-00000100"]
    assert identity(moved, 6) == [name, name]
    assert [row["step"] for row in metrics(moved)] == [1, 2, 3, 4, 5, 6]

    manifest = folder / "checkpoints" / "step-00000004" / "manifest.json"  # as before runs had an identity
    values = json.loads(manifest.read_text())
    del values["run"]
    manifest.write_text(json.dumps(values))
    shutil.rmtree(folder / "checkpoints" / "step-00000003")
    pool.train(path, 1, "data.total_steps=5")
    assert [row["step"] for row in metrics(folder)] == [1, 2, 3, 4, 5]


def test_rows_after_the_checkpoint_and_lines_of_others_are_kept_apart(pool: Pool, tmp_path: Path, config: WriteConfig) -> None:
    path, folder = config("run", ckpt__checkpoint_every=2), tmp_path / "run"
    pool.train(path, 1, "data.total_steps=4")
    shutil.rmtree(folder / "checkpoints" / "step-00000004")  # as if the run had been killed before it was complete
    first, *rest = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join([first, '{"epoch": 1}', "dam\x00ged", *rest]) + "\n")
    pool.train(path, 1, "data.total_steps=5")
    assert [row["step"] for row in metrics(folder)] == [1, 2, 3, 4, 5]
    assert (folder / "metrics.jsonl.removed").read_text().splitlines() == ['{"epoch": 1}', "dam\x00ged", *rest[1:]]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_folder_of_weights_is_not_a_run_folder(tmp_path: Path, config: WriteConfig, processes: int) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    done = run("train", config("run"), "--nproc", processes, code=2)
    assert f"{tmp_path}/run is not a run folder: it contains config.json" in done.stderr
    assert os.listdir(tmp_path / "run") == ["config.json"] and (tmp_path / "run" / "config.json").read_text() == "{}"


@pytest.mark.parametrize("start", ["alone", "nproc", "torchrun, streaming"])
def test_of_two_runs_that_start_together_one_is_refused(tmp_path: Path, config: WriteConfig, start: str) -> None:
    more: dict[str, object] = {}
    if "streaming" in start:
        from internevo.text.tokenizer import train_bpe

        (tmp_path / "texts").mkdir()
        (tmp_path / "texts" / "a.jsonl").write_text("\n".join(json.dumps({"text": "the cat sat " * 9}) for _ in range(40)))
        tokenizer = train_bpe(["the cat sat"] * 3, 300, tmp_path / "tokenizer")
        more = {
            "data__type": "streaming", "data__tokenizer_path": str(tokenizer), "data__train_folder": str(tmp_path / "texts"),
            "model__vocab_size": 300,
        }  # fmt: skip
    path, folder = config("run", **more), tmp_path / "run"
    command = [sys.executable, "-m", "internevo", "train", str(path), *ENDLESS]
    if "torchrun" in start:
        command[1:3] = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "internevo"]
    elif start == "nproc":
        command += ["--nproc", "2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "INTERNEVO_DEVICE": "cpu"}
    outputs = [open(tmp_path / f"{number}.txt", "w") for number in range(2)]
    both = [subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT) for output in outputs]
    try:
        until(lambda: any(one.poll() is not None for one in both) and len(usable_rows(folder / "metrics.jsonl", {})[0]) > 2)
        (loser,) = [number for number, process in enumerate(both) if process.poll() is not None]
        message = (tmp_path / f"{loser}.txt").read_text()
        assert both[loser].returncode == (1 if "torchrun" in start else 2), message
        assert f"{folder} is in use by process " in message and f"on host {os.uname().nodename}, since " in message
        winner = both[1 - loser]
        winner.send_signal(signal.SIGTERM)
        winner.wait(300)
    finally:
        for process, output in zip(both, outputs, strict=True):
            process.kill()
            output.close()
    steps = [row["step"] for row in metrics(folder)]
    assert steps == list(range(1, len(steps) + 1)) and checkpoints(folder) == [f"step-{len(steps):08d}"]


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_a_run_that_diverges_ends_and_keeps_the_last_good_checkpoint(pool: Pool, tmp_path: Path, config: WriteConfig) -> None:
    path, folder = config("run", ckpt__checkpoint_every=2, ckpt__keep_last=1), tmp_path / "run"
    pool.train(path, 1, "data.total_steps=4")
    changes = ("adam.lr=1e30", "data.total_steps=20")
    done = run("train", path, *changes, code=1)
    assert "the run has diverged: it has skipped 5 steps in a row, until step " in done.stderr
    assert "monitor.max_skipped_steps = 5" in done.stderr
    last = metrics(folder)[-1]["step"]
    assert [row["skipped"] for row in metrics(folder)][-6:] == [False, *[True] * 5]
    good = last - 5 - (last - 5) % 2  # the last even step before the first that was skipped
    assert checkpoints(folder) == [f"step-{step:08d}" for step in range(good, last, 2)]
    assert f"from {folder}/checkpoints/step-{good:08d}, the last checkpoint from before" in done.stderr
    kept = checkpoints(folder)
    run("train", path, *changes, code=1)  # the same again takes no step back, and deletes nothing
    assert set(kept) <= set(checkpoints(folder))
