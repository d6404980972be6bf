"""Notes about valid configs: keys that do nothing, and keys that together do something surprising."""

from pathlib import Path
from typing import Any

import pytest

from internevo.config import notes, reference, validate
from internevo.train.config import load_config
from tests.conftest import ROOT, tiny

YARN = {"rope_type": "yarn", "factor": 2.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}


def said(**changes: Any) -> list[str]:
    return notes(validate(tiny(**{"lr_scheduler": {}, **changes})))


@pytest.mark.parametrize(
    ("changes", "noted"),
    [
        ({"data__seq_len": 2048}, False),
        ({"data__seq_len": 4096}, True),
        ({"data__seq_len": 4096, "model__max_position_embeddings": 4096}, False),
        ({"data__seq_len": 4096, "model__rope_scaling": {"rope_type": "default"}}, True),
        ({"data__seq_len": 4096, "model__rope_scaling": {"rope_type": "linear", "factor": "x"}}, True),
        ({"data__seq_len": 4096, "model__rope_scaling": YARN}, False),
        ({"data__seq_len": 4096, "model__rope_scaling": DYNAMIC}, False),
        ({"data__seq_len": 4096, "model__use_dynamic_ntk_rope": True}, False),
        ({"data__seq_len": 4096, "model__rope_type": "dynamic_ntk"}, False),
        ({"data__seq_len": 4096, "model__use_alibi": True, "model_type": "BAICHUAN2"}, False),
    ],
)
def test_rows_that_are_longer_than_the_model_says_are_noted(changes: dict[str, Any], noted: bool) -> None:
    lines = said(**changes)
    assert len(lines) == noted
    assert not noted or "data.seq_len = 4096 is longer than model.max_position_embeddings = 2048" in lines[0]


@pytest.mark.parametrize(
    ("schedule", "noted"),
    [
        ({"total_steps": 9}, True),
        ({"total_steps": 8}, False),
        ({}, False),
        ({"total_steps": 9, "kind": "constant"}, False),
        ({"total_steps": 9, "kind": "constant", "warmup_ratio": 0.5}, True),
        ({"total_steps": 9, "kind": "constant", "warmup_steps": 2}, False),
    ],
)
def test_a_schedule_that_is_longer_than_the_run_is_noted(schedule: dict[str, Any], noted: bool) -> None:
    lines = said(lr_scheduler=schedule)
    assert len(lines) == noted
    assert not noted or "of 9 steps, of which the run takes the first 8" in lines[0]


def test_the_schedule_of_a_ready_config_ends_with_the_run() -> None:
    for path in (ROOT / "configs").glob("*.py"):
        assert not notes(load_config(path, ["data.total_steps=1000"])), path


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"data__train_folder": "a", "data__mixture": [{"folder": "b"}]}, "data.train_folder has no effect with data.mixture"),
        ({"data__valid_folder": "a"}, "data.valid_folder has no effect without data.valid_every"),
        ({"data__valid_folder": "a", "data__valid_every": 1}, None),
        ({"data__micro_num": 4}, "data.micro_num has no effect with data.global_batch_size"),
        ({"data__micro_num": 4, "data__global_batch_size": None}, None),
        ({"model__mlp_ratio": 3.0}, "model.mlp_ratio has no effect with model.intermediate_size"),
        ({"model__multiple_of": 8}, "model.multiple_of has no effect with model.intermediate_size"),
        (
            {"lr_scheduler": {"warmup_ratio": 0.5, "warmup_steps": 2}},
            "lr_scheduler.warmup_ratio has no effect with lr_scheduler.warmup_steps",
        ),
        (
            {"lr_scheduler": {"kind": "wsd", "decay_ratio": 0.5, "decay_steps": 2}},
            "lr_scheduler.decay_ratio has no effect with lr_scheduler.decay_steps",
        ),
    ],
)
def test_a_key_that_another_one_replaces_or_switches_off_is_noted(changes: dict[str, Any], line: str | None) -> None:
    found = said(**changes)
    assert len(found) == bool(line) and all(text.startswith(line or "") for text in found)


def test_keys_of_the_original_share_one_line_in_a_run() -> None:
    config = validate(tiny(lr_scheduler={"last_epoch": 3}, use_fp32_norm=True, data__valid_folder="a"))
    short, whole = notes(config, short=True), notes(config)
    assert len(short) == 2 and len(whole) == 3 and short[1] == whole[2]
    assert short[0] == "2 keys have no effect here (`internevo config` says why): lr_scheduler.last_epoch, use_fp32_norm"
    assert whole[0] == "lr_scheduler.last_epoch has no effect here: the schedule is a function of the step"
    one = validate(tiny(use_fp32_norm=True, lr_scheduler={}))
    assert notes(one, short=True) == notes(one), "one key says why"


def test_sections_that_may_be_left_out_have_a_row_in_the_reference(tmp_path: Path) -> None:
    reference.write(tmp_path / "config.md")
    page = (tmp_path / "config.md").read_text(encoding="utf-8")
    assert "| `data.mixture` | `list[section]` or `None` | `None` |" in page
    for key in ("model.lora", "ckpt.load_ckpt_info", "beta2_scheduler"):
        assert f"| `{key}` | `section` or `None` | `None` |" in page
    assert "| `adam` |" not in page
