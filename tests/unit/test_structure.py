"""The shape of the code: every file is in a room, imports go one way, no module keeps state, families know no PyTorch, and
PyTorch's private names stand in one file per subject."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import internevo

SOURCE = Path(internevo.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
ROOMS = [
    "cli", "commands", "planner", "train", "inference", "measure", "parallel", "checkpoint", "observe", "data", "models",
    "text", "storage", "ops", "config", "wording", "errors",
]  # fmt: skip
"""From top to bottom: a room may import those below it."""
ENTRANCES = {"__init__.py", "__main__.py"}
"""What Python itself asks for."""
SUBROOMS = {
    "data": ["streaming", "encoding", "raw", "tokenized"],
    "models": ["huggingface", "families"],
}  # fmt: skip
PRIVATE = {
    "parallel/collectives.py": "functional collectives",
    "parallel/caches.py": "the caches of DTensor",
    "parallel/gloo.py": "gloo",
    "parallel/pretended.py": "fake process groups",
    "parallel/accumulated.py": "gradients that fully_shard adds up",
    "measure/allocator.py": "the history of a GPU's allocator",
    "ops/dispatch.py": "dispatch modes",
    "ops/compiler.py": "the compiler",
    "ops/foreach.py": "operators on many tensors",
    "ops/precision.py": "what a CPU computes in",
    "ops/documents.py": "attention kernels",
    "ops/flash.py": "the generation of flash attention",
}
"""Files that may use private names of PyTorch, and for which subject."""


def name_of(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def module_path(parts: tuple[str, ...]) -> Path | None:
    """The file of a module of the package, if it is one."""
    base = SOURCE.joinpath(*parts)
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if parts and path.is_file()), None)


def imports(path: Path) -> set[Path]:
    """Files of the package that a file imports, anywhere in it, types included."""
    package, found = path.relative_to(SOURCE).parent.parts, set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = (*package[: len(package) - (node.level - 1)], *(node.module.split(".") if node.module else ()))
            for alias in node.names:
                target = module_path((*base, alias.name)) or module_path(base)
                if target is not None:
                    found.add(target)
    return found


IMPORTS = {path: imports(path) - {path} for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_file_is_in_a_room(path: Path) -> None:
    parts = path.relative_to(SOURCE).parts
    assert name_of(path) in ENTRANCES or room_of(path) in ROOMS, f"{parts[0]} is no room of the house"
    if len(parts) > 2:
        assert parts[1] in SUBROOMS.get(parts[0], ()), f"{parts[0]}/{parts[1]} is no room of the house"


@pytest.mark.parametrize("path", [path for path in FILES if name_of(path) not in ENTRANCES], ids=name_of)
def test_imports_go_down(path: Path) -> None:
    above = ROOMS[: ROOMS.index(room_of(path))]
    wrong = [name_of(target) for target in IMPORTS[path] if room_of(target) in above]
    assert not wrong, f"{name_of(path)} imports {wrong} from above"


def test_files_import_each_other_in_no_circle() -> None:
    done: set[Path] = set()

    def walk(path: Path, way: list[Path]) -> None:
        assert path not in way, " -> ".join(name_of(p) for p in [*way[way.index(path) :], path])
        if path not in done:
            for target in sorted(IMPORTS[path]):
                walk(target, [*way, path])
            done.add(path)

    for path in FILES:
        walk(path, [])
    assert len(done) == len(FILES) > 100


def test_a_circle_is_found() -> None:
    """The test above can fail: a file that imports one of its importers would close a circle."""
    reached, todo = set(), [SOURCE / "train" / "trainer.py"]
    while todo:
        path = todo.pop()
        if path not in reached:
            reached.add(path)
            todo += IMPORTS[path]
    assert {SOURCE / "train" / "restore.py", SOURCE / "models" / "layers.py", SOURCE / "errors.py"} <= reached


@pytest.mark.parametrize("module", ["models.families.registry", "train.check", "config", "cli"])
def test_families_and_checks_need_no_pytorch(module: str) -> None:
    code = f"import sys, internevo.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("path", sorted((SOURCE / "models").rglob("*.py")), ids=lambda p: p.name)
def test_models_know_no_process_group(path: Path) -> None:
    text = path.read_text()
    assert "torch.distributed" not in text and "parallel" not in text


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_modules_keep_no_state(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Global)]
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.List | ast.Dict | ast.Set):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [t.id for t in targets if isinstance(t, ast.Name)]
            assert all(n.isupper() or n.startswith("__") for n in names), f"{names} looks like state"


def private_names(path: Path) -> Iterator[str]:
    """Private names of PyTorch in a file: imported, or as an attribute that none of our own classes defines."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch" and not node.level:
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            yield from (f"{node.module}: {name}" for name in names if is_private(name))
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("torch") and "._" in alias.name)
        elif isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in OWN_PRIVATE:
            yield ast.unparse(node)


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in ("_replace", "_asdict")  # of named tuples


@pytest.mark.parametrize("path", [path for path in FILES if name_of(path) != "parallel/gloo.py"], ids=name_of)
def test_nobody_asks_for_pytorchs_own_gloo(path: Path) -> None:
    """A group of a named backend is made in ``gloo.new_group`` alone, where it gets one thread."""
    for node in ast.walk(ast.parse(path.read_text())):
        assert not (isinstance(node, ast.Constant) and re.search(r"(^|:)gloo(,|$)", str(node.value)))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "new_group":
            of_gloo = isinstance(node.func.value, ast.Name) and node.func.value.id == "gloo"
            assert of_gloo or "backend" not in {keyword.arg for keyword in node.keywords}


def own_private() -> set[str]:
    """Private attributes and methods that the package itself defines."""
    found = {"_exit", "_current_frames"}  # of os, and of sys
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and is_private(node.name):
                found.add(node.name)
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                for target in ast.walk(node):
                    if (
                        isinstance(target, ast.Attribute)
                        and isinstance(target.value, ast.Name)
                        and target.value.id in ("self", "cls")
                    ):
                        found.add(target.attr)
                    elif isinstance(target, ast.Name):
                        found.add(target.id)
    return {name for name in found if is_private(name)}


OWN_PRIVATE = own_private()


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_private_names_of_pytorch_stand_in_one_file_per_subject(path: Path) -> None:
    found = list(private_names(path))
    if name_of(path) in PRIVATE:
        assert found, f"{name_of(path)} uses none any more: take it off the list"
    else:
        assert not found


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_stay_readable_and_say_what_they_are(path: Path) -> None:
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text)), "no docstring"
    assert text.count("\n") <= 400
