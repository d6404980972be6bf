"""A run folder is new, empty or a run's; everything else is refused by name, and nothing is changed."""

import json
import os
import shutil
from pathlib import Path

import pytest

from internevo.checkpoint import Checkpoint, find_checkpoint
from internevo.checkpoint.finish import Extras, complete
from internevo.checkpoint.manifest import NAME, Manifest
from internevo.config import Config
from internevo.errors import CheckpointError, UsageError
from internevo.storage.folders import shared_temporary
from internevo.train.config import load_config
from internevo.train.folder import LOCK, acquire
from tests.conftest import write_config


def config_of(tmp_path: Path, **ckpt: object) -> Config:
    values = {"save_ckpt_folder": str(tmp_path / "run"), **ckpt}
    return load_config(write_config(tmp_path, None, "config", data__train_folder=None, ckpt=values), [])


def save(folder: Path, step: int, run: str = "one") -> Path:
    """Writes a checkpoint without tensors; with ``run`` = "" as versions before runs had an identity did."""
    shared_temporary(folder).mkdir(parents=True)
    complete(shared_temporary(folder), folder, Manifest(step, {}, {}, run=run), Extras({"state.json": {"step": step}}))
    if not run:
        values = json.loads((folder / NAME).read_text())
        del values["run"]
        (folder / NAME).write_text(json.dumps(values))
    return folder


def content(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder, except the lock file."""
    paths = [path for path in folder.rglob("*") if path.name != LOCK]
    return {str(path): path.read_bytes() if path.is_file() else None for path in paths}


def refused(config: Config, tmp_path: Path, message: str) -> None:
    before = content(tmp_path)
    with pytest.raises(UsageError, match=message):
        acquire(config)
    assert content(tmp_path) == before


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "model.safetensors", "notes.txt", "log", "checkpoints"])
@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_a_folder_with_other_files_is_refused_by_name(tmp_path: Path, name: str, kind: str) -> None:
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / name
    if kind == "file":
        path.write_text("mine")
    elif kind == "folder":
        (path / "inside").mkdir(parents=True)
    else:
        path.symlink_to(tmp_path / "nowhere")
    refused(config_of(tmp_path), tmp_path, rf"run is not a run folder: it contains {name},.*ckpt.save_ckpt_folder")
    assert os.listdir(tmp_path / "run") == [name]


@pytest.mark.parametrize("kind", ["file", "dangling link", "file above"])
def test_a_run_folder_that_cannot_be_one_is_refused(tmp_path: Path, kind: str) -> None:
    config = config_of(tmp_path)
    if kind == "file":
        (tmp_path / "run").write_text("mine")
    elif kind == "dangling link":
        (tmp_path / "run").symlink_to(tmp_path / "nowhere")
    else:
        (tmp_path / "file").write_text("mine")
        config = config_of(tmp_path, save_ckpt_folder=str(tmp_path / "file" / "run"))
    refused(config, tmp_path, "the run folder .*run (is not a folder|cannot be used)")


def test_a_new_an_empty_and_a_linked_folder_and_one_that_a_killed_run_has_left_are_run_folders(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    acquire(config).release()  # new
    (tmp_path / "run" / "notes.txt").write_text("mine")
    acquire(config).release()  # a run's, though it has no checkpoint yet
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "disk" / "lost+found").mkdir(parents=True)
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    acquire(config).release()
    assert (tmp_path / "disk" / LOCK).is_file()
    (tmp_path / "disk" / LOCK).unlink()  # as older versions left it
    (tmp_path / "run" / "log").mkdir()
    (tmp_path / "run" / "log" / "rank-00000.log").write_text("")
    acquire(config).release()


def test_what_a_launcher_prints_may_be_in_the_folder_of_a_new_run(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for name in ("slurm-123.out", "123.err", "train.log"):
        (tmp_path / "run" / name).write_text("")
    acquire(config_of(tmp_path)).release()


def test_what_a_run_writes_to_must_be_of_its_kind(tmp_path: Path) -> None:
    save(tmp_path / "run" / "checkpoints" / "step-00000001", 1)
    (tmp_path / "run" / "metrics.jsonl").mkdir()
    refused(config_of(tmp_path), tmp_path, "metrics.jsonl is not a file")


@pytest.mark.parametrize("run", ["one", ""])
@pytest.mark.parametrize("place", ["checkpoints/step-00000003", "snapshots/0"])
def test_a_run_that_does_not_continue_the_checkpoints_in_its_folder_is_refused(tmp_path: Path, run: str, place: str) -> None:
    folder = save(tmp_path / "run" / place, 3, run)
    for key in ("auto_resume", "enable_save_ckpt"):
        refused(
            config_of(tmp_path, **{key: False}), tmp_path, f"checkpoints of another run, the newest in {folder}.*ckpt.{key}"
        )
    acquire(config_of(tmp_path)).release()


@pytest.mark.parametrize("other", ["two", ""])
def test_checkpoints_of_several_runs_are_named(tmp_path: Path, other: str) -> None:
    save(tmp_path / "run" / "checkpoints" / "step-00000009", 9)
    save(tmp_path / "run" / "checkpoints" / "step-00000003", 3, other)
    refused(config_of(tmp_path), tmp_path, "(?s)several runs.*  checkpoints/step-00000009\n  checkpoints/step-00000003\n")


def test_a_damaged_checkpoint_is_not_another_runs(tmp_path: Path) -> None:
    save(tmp_path / "run" / "checkpoints" / "step-00000003", 3)
    (save(tmp_path / "run" / "checkpoints" / "step-00000009", 9) / NAME).write_text("{")
    with pytest.raises(CheckpointError, match="step-00000009/manifest.json is damaged"):
        Checkpoint(find_checkpoint(tmp_path / "run"))
    acquire(config_of(tmp_path)).release()


@pytest.mark.parametrize("text", [b"", b"0", b"-12\n", b" 7 "])
def test_a_stop_file_may_have_been_used_before(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "stop").write_bytes(text)
    acquire(config_of(tmp_path, stop_file_path=str(tmp_path / "stop"))).release()


@pytest.mark.parametrize("text", [b"buy milk", b"1.5", b"7 8", b"\xff", b"1" * 5000 + b"x", None])
def test_a_file_that_is_not_a_stop_file_is_refused(tmp_path: Path, text: bytes | None) -> None:
    path = tmp_path / "notes.txt"
    if text is None:
        path.mkdir()
    else:
        path.write_bytes(text)
    refused(config_of(tmp_path, stop_file_path=str(path)), tmp_path, "ckpt.stop_file_path = .*notes.txt' is not a stop file")
    assert not (tmp_path / "run").exists()


def test_the_folder_is_free_again_after_a_refusal(tmp_path: Path) -> None:
    save(tmp_path / "run" / "checkpoints" / "step-00000003", 3)
    refused(config_of(tmp_path, auto_resume=False), tmp_path, "another run")
    with acquire(config_of(tmp_path)), pytest.raises(UsageError, match="in use by process"):
        acquire(config_of(tmp_path))
    acquire(config_of(tmp_path)).release()
