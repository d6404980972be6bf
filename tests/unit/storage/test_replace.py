"""Files that are replaced at once."""

import os
from pathlib import Path

import pytest

from internevo.storage.replace import replace_text
from tests.unit.storage.test_naming import LIMIT, full_disk


def test_a_file_that_cannot_be_written_keeps_its_old_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    replace_text(path, "old")
    replace_text(path, "new")
    with full_disk(), pytest.raises(OSError, match=r"\.a\.txt\."):
        replace_text(path, "x" * 2 * LIMIT)
    with pytest.raises(UnicodeEncodeError):
        replace_text(path, "\ud800")
    assert path.read_text() == "new"
    replace_text(path, "\ud800", errors="replace")
    assert path.read_text() == "?"
    assert os.listdir(tmp_path) == ["a.txt"]
