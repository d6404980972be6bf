"""Every key of the config: any value is either used or refused by a message that names the key. Made from the schema."""

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import pytest
from pydantic.fields import FieldInfo

from internevo.config import Config, reference, validate
from internevo.config.axes import smallest_world
from internevo.config.load import apply_override, dump, parse_value
from internevo.config.option import PathText, Section, field_extras, field_kinds, section_of
from internevo.errors import ConfigError
from internevo.train.check import missing_features, problems
from tests.conftest import tiny

NUMBERS = [math.nan, math.inf, -math.inf, -1, -0.5, 0, 0.5, 1e300, 10**18, 10**400, True, "many", [1], {}, None]
TEXTS = [2024, True, [], {}, "", "x\0y", "\ud83d", None]
LISTS = [3, True, "x", {}, [None], [[]], [{}], None]
OLDER = {"ckpt.load_model_only_folder": "ckpt.load_ckpt_info.path", "ckpt.load_ckpt_folder": "ckpt.load_ckpt_info.path"}
CHOICES = ["misspelt", 3, [], {}, None]


def options(section: type[Section] = Config, path: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, field in section.model_fields.items():
        inner = section_of(field)
        if inner is None:
            yield path + name, field
        else:
            yield from options(inner, f"{path}{name}.0." if field_kinds(field) & {list} else f"{path}{name}.")


OPTIONS = dict(options())
PATHS = [
    key
    for key, field in OPTIONS.items()
    if PathText in (field.annotation, *get_args(field.annotation)) or get_args(PathText)[1] in field.metadata
]


def with_value(key: str, value: Any) -> dict[str, Any]:
    """The tiny config with one more value."""
    raw = tiny()
    node, names = raw, key.split(".")
    for name, after in itertools.pairwise(names):
        if after == "0":
            node = node.setdefault(name, [{"folder": "a"}])[0]
        elif name != "0":
            node = node.setdefault(name, {})
    node[names[-1]] = value
    return raw


def values(field: FieldInfo) -> list[Any]:
    kinds = field_kinds(field)
    chosen = NUMBERS if kinds & {int, float} else LISTS if kinds & {list, tuple, dict} else CHOICES
    return [*chosen, *TEXTS] if kinds <= {str, NoneType} else chosen


@pytest.mark.parametrize("key", OPTIONS)
def test_any_value_of_any_key_is_used_or_refused_by_name(key: str) -> None:
    from internevo.commands.config import layout_lines

    for value in values(OPTIONS[key]):
        try:
            config = validate(with_value(key, value))
        except ConfigError as error:
            message = str(error)
        else:
            message, world = "", smallest_world(config)
            assert "NaN" not in dump(config) and "Infinity" not in dump(config), value
            fits = not problems(config, world) and not missing_features(config)
            if fits and world < 64 and key.startswith(("model", "data", "parallel")):
                assert layout_lines(config, world, 8), value
        named = key in message or OLDER.get(key, key) in message
        assert not message or (named and len(message) < 1000), message


@pytest.mark.parametrize("key", [key for key, field in OPTIONS.items() if float in field_kinds(field)])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e999"])
def test_no_number_is_infinite(key: str, value: str) -> None:
    for given in (float(value), value):
        with pytest.raises(ConfigError, match=key.replace(".0.", r"\.0\.")):
            validate(with_value(key, given))


def test_folders_and_files_may_be_in_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert {"data.train_folder", "data.mixture.0.folder", "ckpt.save_ckpt_folder", "ckpt.stop_file_path"} < set(PATHS)
    for key in PATHS:
        node: Any = validate(with_value(key, "~/a"))
        for name in key.split("."):
            node = node[0] if name == "0" else getattr(node, name)
        assert node == "/home/me/a", key
    assert validate(with_value("ckpt.save_ckpt_folder", "local:~/a")).run_folder == Path("/home/me/a")


@pytest.mark.parametrize("key", [key for key in OPTIONS if str in field_kinds(OPTIONS[key])])
def test_an_override_of_a_text_is_a_text(key: str) -> None:
    """2024 is a number in Python, and a good name of a run."""
    field = OPTIONS[key]
    if ".0." in key or field_kinds(field) & {int, float, bool}:
        return
    for text in ("2024", "3,10-20", "1e-4", "true", "[1]", "{}"):
        raw: dict[str, Any] = {}
        apply_override(raw, f"{key}={text}")
        for name in key.split("."):
            raw = raw[name]
        assert isinstance(raw, str) or type(raw) in field_kinds(field), (key, text, raw)


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("data.skip_batches=3", "skip_batches", "3"),
        ("data.skip_batches=1,3", "skip_batches", "1,3"),
        ("data.skip_batches='3'", "skip_batches", "3"),
        ("data.skip_batches=", "skip_batches", ""),
        ("data.rampup_batch_size=none", "rampup_batch_size", None),
        ("data.micro_num=08", "micro_num", 8),
        ("data.use_packed_dataset=false", "use_packed_dataset", False),
        ("data.train_folder=2024", "train_folder", "2024"),
    ],
)
def test_overrides_are_read_by_the_type_of_their_key(override: str, key: str, value: Any) -> None:
    raw = tiny()
    apply_override(raw, override)
    assert getattr(validate(raw).data, key) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("dict()", {}),
        ("dict(a=1, b=dict(c=(1, 'x')))", {"a": 1, "b": {"c": (1, "x")}}),
        ("[dict(a=1)]", [{"a": 1}]),
        ("dict(**x)", "dict(**x)"),
        ("dict(1)", "dict(1)"),
        ("print(a=1)", "print(a=1)"),
    ],
)
def test_an_override_may_have_a_section_as_config_files_do(text: str, value: Any) -> None:
    assert parse_value(text) == value


def test_every_option_is_used_or_says_that_it_is_not() -> None:
    """A key without "no effect" and without "not available yet" is read somewhere outside of the schema."""
    import internevo

    source = Path(internevo.__file__).parent
    files = [
        path
        for path in source.rglob("*.py")
        if path.parent.name != "config" or path.name in ("check.py", "divided.py", "internevo.py")
    ]
    code = (
        "\n".join(path.read_text(encoding="utf-8") for path in files)
        + (source / "config" / "model.py").read_text(encoding="utf-8").partition("def mlp_width")[2]
        + (source / "config" / "training.py").read_text(encoding="utf-8").partition("def warmup")[2]
    )
    unread = []
    for key, field in OPTIONS.items():
        extras, name = field_extras(field), key.rsplit(".", 1)[-1]
        if not (extras.get("ignored") or extras.get("not_available")) and f".{name}" not in code and f'"{name}"' not in code:
            unread.append(key)
    assert not unread


def test_every_number_with_an_effect_has_a_range(tmp_path: Path) -> None:
    """Any number has a meaning for these three: 0 or less stand for a default."""
    reference.write(tmp_path / "config.md")
    page = (tmp_path / "config.md").read_text(encoding="utf-8")
    assert "Annotated" not in page and "FieldInfo" not in page
    for key, field in OPTIONS.items():
        extras = field_extras(field)
        if field_kinds(field) & {int, float} and not (extras.get("ignored") or extras.get("not_available")):
            line = next(line for line in page.splitlines() if line.startswith(f"| `{key.replace('.0.', '.')}`"))
            any_number = ("beta2_scheduler.c", "parallel.zero1.size", "model.checkpoint")
            assert "It must be " in line or key in any_number, key
