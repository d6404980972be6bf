"""What is said about a wrong value or an unknown key, and texts that stand for lists."""

import re
from typing import Any

import pytest

from internevo.config import validate
from internevo.config.load import apply_override
from internevo.config.option import holds_texts
from internevo.errors import ConfigError
from tests.conftest import tiny
from tests.unit.config.test_keys import OPTIONS, with_value


def lines(raw: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        validate(raw)
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


@pytest.mark.parametrize(
    ("key", "value", "kinds"),
    [
        ("model.checkpoint", "full", "True, False, a number from 0 to 1 or 'attention'"),
        ("model.checkpoint", 2, "True, False, a number from 0 to 1 or 'attention'"),
        ("model.checkpoint", [], "True, False, a number from 0 to 1 or 'attention'"),
        ("ckpt.load_ckpt_folder", 3, "text, a section with keys or None"),
        ("generation.eos_id", "x", "a whole number, a list or None"),
        ("generation.eos_id", ["x"], "a whole number, a list or None"),
    ],
)
def test_a_value_that_is_none_of_several_kinds_is_one_problem(key: str, value: Any, kinds: str) -> None:
    assert lines(with_value(key, value)) == [f"{key}: must be {kinds} (got {value!r})"]


@pytest.mark.parametrize(("value", "share"), [(True, 1.0), (False, 0.0), (1, 1.0), (1.0, 1.0), (0.5, 0.5)])
def test_a_share_of_the_layers_is_a_number(value: Any, share: float) -> None:
    found = validate(tiny(model__checkpoint=value)).model.checkpoint
    assert found == share and type(found) is float


TEXTS = {key: field for key, field in OPTIONS.items() if holds_texts(field)}


@pytest.mark.parametrize("key", TEXTS)
def test_one_text_stands_for_a_list_of_texts(key: str) -> None:
    examples = {
        "model.lora.targets": "q", "ckpt.load_ckpt_info.content": "model", "ckpt.load_ckpt_info.may_differ": "rope_base",
        "monitor.trackers": "wandb",
    }  # fmt: skip
    text = examples.get(key, "2024")
    raw = tiny()
    apply_override(raw, f"{key}={text}")
    found: Any = validate(raw)
    for name in key.split("."):
        found = getattr(found, name)
    assert found == (text,)


def test_lists_of_texts_are_found() -> None:
    assert {"monitor.tasks", "monitor.sample_prompts", "monitor.trackers", "monitor.wandb.tags"} < set(TEXTS)
    assert not {"data.train_folder", "parallel.pipeline.layers", "generation.eos_id", "gradient_handler"} & set(TEXTS)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optimizer.lr=3", ["optimizer.lr: unknown key; did you mean adam.lr?"]),
        ("training.seq_len=3", ["training.seq_len: unknown key; did you mean data.seq_len?"]),
        ("optimizer={'lr': 3, 'foo': 1}", ["optimizer.lr: unknown key; did you mean adam.lr?", "optimizer.foo: unknown key"]),
        ("lr=3", ["lr: unknown key; did you mean adam.lr?"]),
        ("checkpoint=1", ["checkpoint: unknown key; did you mean model.checkpoint?"]),
        ("data.lr=3", ["data.lr: unknown key; did you mean adam.lr?"]),
        ("model.rank=3", ["model.rank: unknown key; did you mean model.lora.rank?"]),
        ("parallel.tensr=4", ["parallel.tensr: unknown key; did you mean parallel.tensor?"]),
        ("modle.num_layers=2", ["modle: unknown key; did you mean model?"]),
        ("data.micro_nun=2", ["data.micro_nun: unknown key; did you mean data.micro_num?"]),
        ("some=3", ["some: unknown key; write the file's own names in capitals or with a leading underscore"]),
    ],
)
def test_an_unknown_key_is_looked_for_in_all_sections(override: str, said: list[str]) -> None:
    raw = tiny()
    apply_override(raw, override)
    assert lines(raw) == said


@pytest.mark.parametrize("text", ["data.total_steps", "=", "data..lr=3"])
def test_an_override_is_written_without_spaces(text: str) -> None:
    with pytest.raises(
        ConfigError, match=re.escape(f"override {text!r} does not have the form key.path=value (without spaces)")
    ):
        apply_override({}, text)
