"""Folders appear only when they are complete, even if the process is killed, and files of other programs are not touched."""

import os
import stat
from pathlib import Path

import pytest

from internevo.storage.folders import clean_up, find_folders, put_in_place, temporary
from tests.kills import kill_at_every_moment


def make(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "file").write_text(text)
    return folder


@pytest.mark.parametrize("replaced", [False, True])
def test_a_process_killed_at_any_moment_leaves_the_old_or_the_new_folder(tmp_path: Path, replaced: bool) -> None:
    seen = set()

    def prepare(parent: Path) -> None:
        if replaced:
            make(parent / "step-1", "old")

    def act(parent: Path) -> None:
        with temporary(parent / "step-1") as new:
            (new / "file").write_text("new")
            put_in_place(new, parent / "step-1")

    def check(parent: Path) -> None:
        found = {name: (path / "file").read_text() for name, path in find_folders(parent, r"step-\d").items()}
        assert found in ([{"step-1": "old"}, {"step-1": "new"}] if replaced else [{}, {"step-1": "new"}])
        clean_up(parent, r"step-\d")
        assert os.listdir(parent) == list(found)
        assert {name: (parent / name / "file").read_text() for name in found} == found
        seen.add(found.get("step-1"))

    moments = kill_at_every_moment(tmp_path, prepare, act, check)
    assert moments >= 3
    assert seen == {"old" if replaced else None, "new"}


def test_a_failure_leaves_no_temporary_folder_and_keeps_the_old_one(tmp_path: Path) -> None:
    make(tmp_path / "out", "old")

    def fail() -> None:
        with temporary(tmp_path / "out") as new:
            (new / "file").write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out" / "file").read_text() == "old"


def test_only_temporary_folders_of_the_named_folders_are_removed(tmp_path: Path) -> None:
    others = [
        "step-1",
        "step-1.tmp",
        "step-1.old",
        ".step-1",
        ".step-x.tmp",
        ".step-1.backup.old",
        "notes.tmp",
        ".step-1.tmp.old",
    ]
    ours = [".step-1.tmp", ".step-2.tmp", ".step-2.0a1b2c3d.tmp", ".step-1.0a1b2c3d.old"]
    for name in (*others, *ours):
        make(tmp_path / name, name)
    clean_up(tmp_path, r"step-\d")
    assert sorted(os.listdir(tmp_path)) == sorted(others)
    clean_up(tmp_path / "not there", r"step-\d")


def test_a_new_folder_has_the_permissions_of_the_users_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with temporary(tmp_path / "a" / "out") as new:
            put_in_place(new, tmp_path / "a" / "out")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a" / "out").stat().st_mode) == 0o750


def test_replacing_a_symbolic_link_keeps_its_target(tmp_path: Path) -> None:
    make(tmp_path / "elsewhere", "old")
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    with temporary(tmp_path / "out") as new:
        (new / "file").write_text("new")
        put_in_place(new, tmp_path / "out")
    assert (tmp_path / "out" / "file").read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == ["elsewhere", "out"]
    assert (tmp_path / "elsewhere" / "file").read_text() == "old"
