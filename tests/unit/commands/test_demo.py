"""``internevo demo`` checks everything before it writes anything, and touches only what a demo has written."""

from pathlib import Path

import pytest

from internevo.commands import demo
from internevo.errors import UsageError
from tests.conftest import ROOT

CONFIG = ROOT / "configs" / "demo.py"


@pytest.mark.parametrize("name", ["data", "run", "hf"])
def test_folders_of_others_are_not_touched(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "mine").write_text("x")
    with pytest.raises(UsageError, match=f"{tmp_path / name} is not from a demo; give another folder with --folder"):
        demo.run(CONFIG, tmp_path, 1)
    assert [path.name for path in tmp_path.rglob("*")] == [name, "mine"]


def test_a_demo_may_be_repeated_beside_other_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[str] = []
    monkeypatch.setattr(demo, "_internevo", lambda *arguments: commands.append(arguments[0]))
    monkeypatch.setattr(demo, "compare_with_transformers", lambda folder: 0.0)
    (tmp_path / "notes.txt").write_text("x")
    for _ in range(2):
        demo.run(CONFIG, tmp_path, 1)
        (tmp_path / "hf").mkdir(exist_ok=True)
    assert commands == ["tokenize", "inspect", "train", "generate", "convert"] * 2
    assert (tmp_path / "notes.txt").read_text() == "x"


def test_what_is_missing_is_said_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is not a folder; give another one"):
        demo.run(CONFIG, tmp_path / "file", 1)
    with pytest.raises(UsageError, match="run this command in the repository, or use --config"):
        demo.run(tmp_path / "no.py", tmp_path / "new", 1)
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="the demo needs transformers"):
        demo.run(CONFIG, tmp_path / "new", 1)
    assert not (tmp_path / "new").exists()
