"""The shape of the code: imports go one way, no module keeps state, models know no strategy."""

import ast
from pathlib import Path

import pytest

import internevo

SOURCE = Path(internevo.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
ORDER = [
    "errors",
    "tensorfile",
    "config",
    "ops",
    "tokenizer",
    "models",
    "data",
    "parallel",
    "checkpoint",
    "interchange",
    "generate",
    "observe",
    "train",
]
"""A package may import those before it (and a few leaves that all may use)."""


def imports(path):
    """(imported part of internevo, at the top of the file) of a source file."""
    package = path.relative_to(SOURCE).parent.parts
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - (node.level - 1)]
            parts = (*base, *(node.module.split(".") if node.module else ()))
            if parts:
                yield parts[0]
            else:
                yield from (alias.name for alias in node.names if alias.name in ORDER)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_go_one_way(path):
    mine = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    if mine not in ORDER:
        return  # the command line and what hangs on it
    later = ORDER[ORDER.index(mine) + 1 :]
    assert not set(imports(path)) & set(later)


@pytest.mark.parametrize("path", sorted((SOURCE / "models").rglob("*.py")), ids=lambda p: p.name)
def test_models_know_no_process_group(path):
    text = path.read_text()
    assert "torch.distributed" not in text and "parallel" not in text


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_modules_keep_no_state(path):
    tree = ast.parse(path.read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Global)]
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.List | ast.Dict | ast.Set):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [t.id for t in targets if isinstance(t, ast.Name)]
            assert all(n.isupper() or n.startswith("__") for n in names), f"{names} looks like state"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_files_stay_readable_and_say_what_they_are(path):
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text)), "no docstring"
    assert text.count("\n") <= 400
