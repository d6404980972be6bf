"""The documentation names files and config keys that exist, and each page begins with something to run."""

import inspect
import operator
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import internevo
from internevo.config.option import Section, section_of
from internevo.config.schema import Config
from internevo.train import run
from tests.conftest import ROOT

PAGES = [*ROOT.glob("*.md"), *(page for page in (ROOT / "docs").rglob("*.md") if page.parent.name != "reference")]
LINK = re.compile(r"\]\(([^)#]+)[^)]*\)")
FILE = re.compile(r"(?<![\w/.<>-])(?:src|docs|configs|tests|benchmarks|deploy)/[\w./-]*\w")
KEY = re.compile(r"(?<![\w./])((?:{})(?:\.[a-z]\w+)+)(?:\s?=|`)".format("|".join(Config.model_fields)))
NOT_HERE = {"docs/reference/config.md", "src/internevo/models/families/seed_oss.py"}
"""Made by the build, and an example's."""
NO_KEYS = {"data.micro_bzs", "model.json", "model.safetensors"}
"""A mistake that is shown, and names of files."""


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", ROOT.glob("*.md"), ids=name_of)
def test_links_lead_to_files(page: Path) -> None:
    """Those of docs/ are checked by mkdocs --strict."""
    targets = {target for target in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in target}
    assert {target for target in targets if not (page.parent / target).exists()} == set()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_named_files_exist(page: Path) -> None:
    named = set(FILE.findall(page.read_text(encoding="utf-8"))) - NOT_HERE
    assert {name for name in named if not (ROOT / name).exists()} == set()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_named_config_keys_exist(page: Path) -> None:
    named = set(KEY.findall(page.read_text(encoding="utf-8"))) - NO_KEYS
    assert {key for key in named if not is_key(key)} == set()


def is_key(path: str) -> bool:
    section: type[Section] | None = Config
    for name in path.split("."):
        if section is None or name not in section.model_fields:
            return False
        section = section_of(section.model_fields[name])
    return True


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent != ROOT], ids=name_of)
def test_a_page_begins_with_something_to_run(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    beginning = text.split("\n## ")[0]
    assert re.search(r"^```(bash|python)$", beginning, re.M)


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_shell_commands_can_be_parsed(page: Path) -> None:
    """And none that a comment swallows: a loop whose `done` is in a comment has no end."""
    blocks = re.findall(r"^```(?:bash|sh|shell)$\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)
    for block in blocks:
        parsed = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True)
        assert parsed.returncode == 0, f"{parsed.stderr}\n{block}"


def test_the_table_of_the_python_api_is_true() -> None:
    """Its functions are those of the package, with these parameters and results, in their order."""
    rows = re.findall(r"^\| `([\w.]+)\((.*?)\) -> (.*?)` \|", (ROOT / "docs/api.md").read_text(encoding="utf-8"), re.M)
    assert {name.split(".")[0] for name, *_ in rows} == set(internevo.__all__)
    for name, text, result in rows:
        function = run.train if name == "train" else operator.attrgetter(name)(internevo)
        signature = inspect.signature(function)
        parameters = {each.name: str(each.replace(annotation=each.empty)) for each in signature.parameters.values()}
        shown = [each for each in text.split(", ") if each not in ("*", "...")]
        assert shown == [parameter for parameter in parameters.values() if parameter in shown], name
        required = [key for key, each in signature.parameters.items() if each.default is each.empty]
        assert set(required) <= set(shown) and ("..." in text) == (len(shown) < len(parameters)), name
        assert signature.return_annotation == result, name


def test_the_runs_of_the_strategies_have_run_folders_of_their_own() -> None:
    """A command of one page does not find the run of another page, or of the demo, which is another model."""
    pages = sorted((ROOT / "docs/strategies").glob("*.md"))
    text = "\n".join(page.read_text(encoding="utf-8").replace("\\\n", " ") for page in pages)
    commands = re.findall(r"^internevo train configs/(?!.*--dry-run).*", text, re.M)
    folders = [re.findall(r"ckpt\.save_ckpt_folder=(runs/\S+)", command) for command in commands]
    assert all(len(found) == 1 for found in folders), commands
    assert len({found[0] for found in folders}) == len(commands) > 8


@pytest.mark.parametrize("name", ["README-zh-Hans.md", "README-ja-JP.md"])
def test_a_translation_of_the_readme_says_the_same(name: str) -> None:
    """The same headings, commands (without their comments), links and rows of tables, in the same order."""
    english, translation = ((ROOT / page).read_text(encoding="utf-8") for page in ("README.md", name))
    assert skeleton(translation) == skeleton(english)


def skeleton(text: str) -> list[tuple[str, ...]]:
    """What a translation leaves as it is: levels of headings, blocks of code, the code and links of each paragraph and row."""
    parts = re.findall(r"^```.*?^```$|^[^\n]+(?:\n(?!```|\|)[^\n]+)*", text, re.MULTILINE | re.DOTALL)
    commands = (re.sub(r"\s+#.*", "", part) if part.startswith("```") else part for part in parts if "README-" not in part)
    return [(part,) if part.startswith("```") else of_paragraph(part) for part in commands]


def of_paragraph(part: str) -> tuple[str, ...]:
    """A heading's level, or a row's number of cells; and sorted code and links, since languages order words differently."""
    kind = part.split()[0] if part.startswith("#") else f"{part.count('|')} cells"
    return (kind, *sorted(re.findall(r"`[^`\n]+`", part) + LINK.findall(part)))
