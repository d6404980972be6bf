"""Folders that appear when they are whole, whenever the process is killed, and touch nothing of others."""

import os
import stat

import pytest

from internevo.storage.folders import put_in_place, standing, temporary, tidy
from tests.kills import kill_at_every_moment


def make(folder, text):
    folder.mkdir(parents=True)
    (folder / "file").write_text(text)
    return folder


@pytest.mark.parametrize("replaced", [False, True])
def test_killed_at_any_moment_the_old_or_the_new_folder_stands(tmp_path, replaced):
    seen = set()

    def prepare(place):
        if replaced:
            make(place / "step-1", "old")

    def act(place):
        with temporary(place / "step-1") as new:
            (new / "file").write_text("new")
            put_in_place(new, place / "step-1")

    def check(place):
        found = {name: (path / "file").read_text() for name, path in standing(place, r"step-\d").items()}
        assert found in ([{"step-1": "old"}, {"step-1": "new"}] if replaced else [{}, {"step-1": "new"}])
        tidy(place, r"step-\d")
        assert os.listdir(place) == list(found)
        assert {name: (place / name / "file").read_text() for name in found} == found
        seen.add(found.get("step-1"))

    moments = kill_at_every_moment(tmp_path, prepare, act, check)
    assert moments >= 3
    assert seen == {"old" if replaced else None, "new"}


def test_a_failure_leaves_nothing_and_what_was_there_stays(tmp_path):
    make(tmp_path / "out", "old")

    def fail():
        with temporary(tmp_path / "out") as new:
            (new / "file").write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out" / "file").read_text() == "old"


def test_only_leftovers_of_the_named_folders_are_removed(tmp_path):
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
    tidy(tmp_path, r"step-\d")
    assert sorted(os.listdir(tmp_path)) == sorted(others)
    tidy(tmp_path / "not there", r"step-\d")


def test_a_new_folder_has_the_permissions_that_the_user_gives(tmp_path):
    before = os.umask(0o027)
    try:
        with temporary(tmp_path / "a" / "out") as new:
            put_in_place(new, tmp_path / "a" / "out")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a" / "out").stat().st_mode) == 0o750


def test_a_link_that_is_replaced_does_not_lose_its_target(tmp_path):
    make(tmp_path / "elsewhere", "old")
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    with temporary(tmp_path / "out") as new:
        (new / "file").write_text("new")
        put_in_place(new, tmp_path / "out")
    assert (tmp_path / "out" / "file").read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == ["elsewhere", "out"]
    assert (tmp_path / "elsewhere" / "file").read_text() == "old"
