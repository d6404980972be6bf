"""The notebook of the documentation runs from beginning to end, and its model has learned to answer."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT


def test_the_notebook_runs_and_its_model_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = json.loads((ROOT / "docs" / "notebook.ipynb").read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert len(sources) > 5 and not any(cell.get("outputs") for cell in cells)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, source in enumerate(sources):
        exec(compile(source, f"notebook.ipynb, code cell {number}", "exec"), names)
    assert names["answers"] == [f"The {animal} says {sound}." for animal, sound in names["sounds"].items()]
    assert names["losses"][39] < 0.5 * names["losses"][0] and len(names["losses"]) == 240
    assert (tmp_path / "notebook" / "hf" / "chat_template.jinja").is_file()
