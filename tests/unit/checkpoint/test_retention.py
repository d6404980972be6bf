"""What a save deletes or replaces: only what the same run has saved, and never what it has just saved."""

from pathlib import Path
from unittest import mock

import pytest

from internevo.checkpoint import complete_checkpoints
from internevo.checkpoint.finish import Extras, complete
from internevo.checkpoint.folder import saved_checkpoints
from internevo.checkpoint.manifest import NAME, Head, Manifest
from internevo.checkpoint.saver import Saver
from internevo.config.run import Ckpt
from internevo.storage.folders import shared_temporary


def save(folder: Path, step: int, run: str = "mine") -> None:
    shared_temporary(folder).mkdir(parents=True)
    complete(shared_temporary(folder), folder, Manifest(step, {}, {}, run=run), Extras({}))


def saver(run: Path, **keys: int) -> Saver:
    return Saver(run, Ckpt.model_validate(keys), 0, {}, group=None, identity="mine")  # type: ignore[arg-type]


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def of(*steps: int) -> list[str]:
    return [f"step-{step:08d}" for step in steps]


@pytest.mark.parametrize(
    ("keys", "kept"),
    [
        ({}, (3, 6, 9, 12)),
        ({"keep_last": 1}, (12,)),
        ({"keep_last": 3}, (6, 9, 12)),
        ({"keep_last": 9}, (3, 6, 9, 12)),
        ({"keep_last": 1, "keep_every": 6}, (6, 12)),
    ],
)
def test_the_newest_are_kept(tmp_path: Path, keys: dict[str, int], kept: tuple[int, ...]) -> None:
    for step in (3, 6, 9, 12):
        save(tmp_path / "checkpoints" / of(step)[0], step)
    saver(tmp_path, **keys)._retain(12)
    assert names(tmp_path) == of(*kept)


def test_a_checkpoint_that_cannot_be_read_takes_no_others_place(tmp_path: Path) -> None:
    """Its head and end are whole, as what only those are read of."""
    for step in (3, 6, 9, 12):
        save(tmp_path / "checkpoints" / of(step)[0], step)
    path = tmp_path / "checkpoints" / of(9)[0] / NAME
    path.write_text(path.read_text().replace('"tensors": {}', '"tensors": {"x" }'))
    assert Head.read(path.parent).step == 9
    saver(tmp_path, keep_last=2)._retain(12)
    assert names(tmp_path) == of(6, 9, 12)


@pytest.mark.parametrize("last", [1, 2])
def test_what_has_just_been_saved_stays_whatever_else_is_there(tmp_path: Path, last: int) -> None:
    for step in (9, 12):
        save(tmp_path / "checkpoints" / of(step)[0], step)
    for step in (3, 6):
        save(tmp_path / "checkpoints" / of(step)[0], step)
        saver(tmp_path, keep_last=last)._retain(step)
        assert of(step)[0] in names(tmp_path)
    assert names(tmp_path) == of(*([6, 9, 12] if last == 1 else [3, 6, 9, 12]))


OTHERS = ["step-0000002b", "step-00000100", "step-00000001.old", "step-٠٠٠٠٠٠٠٣", "step-1", "step-", "backup", "step-00000007"]


def test_renamed_folders_and_those_of_others_are_never_deleted_and_do_not_count(tmp_path: Path) -> None:
    for name in OTHERS[:-1]:
        save(tmp_path / "checkpoints" / name, 1)
    save(tmp_path / "checkpoints" / OTHERS[-1], 7, run="another")
    (tmp_path / "checkpoints" / "step-00000008").mkdir()  # without a manifest
    (tmp_path / "checkpoints" / "step-00000009").write_text("a file")
    for step in (2, 4, 6):
        save(tmp_path / "checkpoints" / of(step)[0], step)
    (tmp_path / "checkpoints" / of(2)[0] / NAME).write_text("damaged")
    saver(tmp_path, keep_last=1)._retain(6)
    assert names(tmp_path) == sorted([*OTHERS, *of(2, 6, 8, 9)])


def test_the_manifest_says_the_step_and_not_the_name(tmp_path: Path) -> None:
    save(tmp_path / "checkpoints" / "step-00000100", 12)
    save(tmp_path / "checkpoints" / "step-00000015", 15)
    save(tmp_path / "checkpoints" / "step-٢٠", 20)
    save(tmp_path / "snapshots" / "0", 14)
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step-00000015", "0", "step-00000100"]


@pytest.mark.parametrize("place", ["checkpoints/step-00000009", "snapshots/0"])
@pytest.mark.parametrize("there", ["other run", "no manifest", "file"])
def test_what_is_in_the_place_of_a_new_checkpoint_gets_another_name(tmp_path: Path, place: str, there: str) -> None:
    folder = tmp_path / place
    if there == "other run":
        save(folder, 9, run="another")
    elif there == "no manifest":
        (folder / "inside").mkdir(parents=True)
    else:
        folder.parent.mkdir()
        folder.write_text("mine")
    saver(tmp_path)._protect(folder)
    assert [path.name for path in folder.parent.iterdir()] == [f"{folder.name}.1"]


def test_a_renamed_checkpoint_of_the_run_is_not_replaced_by_that_step(tmp_path: Path) -> None:
    save(tmp_path / "checkpoints" / "step-00000100", 12)
    saver(tmp_path)._protect(tmp_path / "checkpoints" / "step-00000100")
    assert names(tmp_path) == ["step-00000100.1"]


@pytest.mark.parametrize("place", ["checkpoints/step-00000009", "snapshots/0"])
def test_an_earlier_save_of_the_same_run_is_replaced(tmp_path: Path, place: str) -> None:
    save(tmp_path / place, 9)
    saver(tmp_path)._protect(tmp_path / place)
    assert Head.read(tmp_path / place) == (9, "mine")


def test_whole_manifests_are_not_read_which_may_be_large(tmp_path: Path) -> None:
    for step in (3, 6, 9):
        save(tmp_path / "checkpoints" / of(step)[0], step)
    save(tmp_path / "snapshots" / "0", 8)
    with mock.patch.object(Manifest, "read", side_effect=AssertionError("a whole manifest is read")):
        assert [path.name for path in complete_checkpoints(tmp_path)] == [*of(9), "0", *of(6, 3)]
        assert list(saved_checkpoints(tmp_path, "mine")) == [3, 6, 9]
        saver(tmp_path)._protect(tmp_path / "checkpoints" / of(9)[0])
        saver(tmp_path, keep_last=1)._retain(9)
    assert names(tmp_path) == of(9)
