"""After a save is killed at any moment, either the new checkpoint is complete, or the earlier ones are as before."""

import os
from pathlib import Path

import pytest

from internevo.checkpoint import Checkpoint, complete_checkpoints
from internevo.checkpoint.finish import Extras, complete
from internevo.checkpoint.folder import remove_leftovers
from internevo.checkpoint.manifest import Manifest, verify
from internevo.storage.folders import shared_temporary
from tests.kills import kill_at_every_moment


def save(folder: Path, step: int, which: str) -> None:
    temporary = shared_temporary(folder)
    (temporary / "tokenizer").mkdir(parents=True)
    (temporary / "tokenizer" / "tokenizer.json").write_text("{}")
    complete(temporary, folder, Manifest(step, {}, {}), Extras({"state.json": {"step": step, "which": which}}))


def found(run: Path) -> list[tuple[int, str]]:
    """Verifies every complete checkpoint. Returns (step, which save wrote it) of each."""
    result = []
    for folder in complete_checkpoints(run):
        checkpoint = Checkpoint(folder)
        verify(folder, sorted(checkpoint.manifest.files), checkpoint.manifest)
        result.append((checkpoint.manifest.step, checkpoint.json("state.json")["which"]))
    return result


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("checkpoints/step-00000004", None, 4),
        ("checkpoints/step-00000004", 4, 4),
        ("snapshots/0", 3, 5),
    ],
    ids=["a new step", "the same step again", "a snapshot is replaced"],
)
def test_a_kill_leaves_one_complete_checkpoint(tmp_path: Path, name: str, before: int | None, after: int) -> None:
    seen = set()

    def prepare(run: Path) -> None:
        save(run / "checkpoints" / "step-00000002", 2, "earlier")
        if before:
            save(run / name, before, "old")

    def check(run: Path) -> None:
        old, new = [(before, "old")] if before else [], [(after, "new")]
        assert found(run) in ([*old, (2, "earlier")], [*new, (2, "earlier")])
        kept = found(run)
        remove_leftovers(run)
        assert found(run) == kept
        for parent in ("checkpoints", "snapshots"):
            if (run / parent).exists():
                assert not [n for n in os.listdir(run / parent) if n.startswith(".") or n.endswith((".tmp", ".old"))]
        seen.add(kept[0][1])

    moments = kill_at_every_moment(tmp_path, prepare, lambda run: save(run / name, after, "new"), check)
    assert moments > 8
    assert seen == {"old" if before else "earlier", "new"}


def test_folders_with_other_names_are_not_checkpoints(tmp_path: Path) -> None:
    save(tmp_path / "checkpoints" / "step-00000002", 2, "one")
    for other in ("step-00000003.old", "step-00000003.tmp", "step-00000003b", "backup"):
        save(tmp_path / "checkpoints" / other, 3, other)
    assert found(tmp_path) == [(2, "one")]
    remove_leftovers(tmp_path)
    assert len(os.listdir(tmp_path / "checkpoints")) == 5


def test_incomplete_exports_are_removed_and_other_folders_stay(tmp_path: Path) -> None:
    for name in ("hf/.step-00000002.01234567.tmp", "hf/step-00000002", "hf/.cache", ".step-00000002.tmp"):
        (tmp_path / name).mkdir(parents=True)
    remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path / "hf")) == [".cache", "step-00000002"]
    assert (tmp_path / ".step-00000002.tmp").is_dir()
