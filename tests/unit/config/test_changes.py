"""A run that goes on says which keys of training have other values than in its checkpoint."""

import json
from typing import Any

import pytest

from internevo.config import dump, validate
from internevo.config.changes import MOST, changes
from tests.conftest import tiny

BASE: dict[str, Any] = {"lr_scheduler": {}}


def recorded(**values: Any) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(dump(validate(tiny(**{**BASE, **values}))))
    return config


def said(new: dict[str, Any], old: dict[str, Any]) -> list[str]:
    return changes(validate(tiny(**{**BASE, **new})), old)


@pytest.mark.parametrize(
    ("new", "old", "lines"),
    [
        ({}, {}, []),
        ({"adam__lr": 3e-4}, {"adam__lr": 1e-4}, ["adam.lr = 0.0003, and was 0.0001 in the checkpoint"]),
        (
            {"beta2_scheduler": {"c": 0.5}},
            {},
            [f"beta2_scheduler.{key}, and was None in the checkpoint" for key in ("init_beta2 = 0.95", "c = 0.5")],
        ),
        ({"seed": 2}, {"seed": 1}, ["seed = 2, and was 1 in the checkpoint"]),
        ({"model__dtype": "torch.bfloat16"}, {}, ["model.dtype = 'bfloat16', and was 'float32' in the checkpoint"]),
        (
            {"data__mixture": [{"folder": "there/a", "weight": 2.0}]},
            {"data__mixture": [{"folder": "here/a", "weight": 1.0}]},
            ["data.mixture is not what it was in the checkpoint"],
        ),
    ],
)
def test_a_key_of_training_that_has_changed_is_named(new: dict[str, Any], old: dict[str, Any], lines: list[str]) -> None:
    assert said(new, recorded(**old)) == lines


@pytest.mark.parametrize(
    "new",
    [
        {"JOB_NAME": "other"},
        {"ckpt__checkpoint_every": 3},
        {"monitor__log_every": 7},
        {"data__train_folder": "elsewhere"},
        {"enable_tb": False},
        {"data__use_shm": True},
    ],
)
def test_names_folders_logging_and_keys_without_an_effect_are_not(new: dict[str, Any]) -> None:
    assert said(new, recorded()) == []


def test_a_mixture_whose_folders_have_moved_is_the_same() -> None:
    there, here = ({"data__mixture": [{"folder": folder, "weight": 2.0}]} for folder in ("there/a", "here/a"))
    assert said(there, recorded(**here)) == []


def test_keys_that_an_older_version_did_not_have_are_not_compared() -> None:
    old = recorded()
    del old["adam"], old["data"]["seed"], old["seed"]
    assert said({"adam__lr": 7e-4, "data__seed": 3, "seed": 3}, old) == []
    assert said({}, {"adam": 3}) == []


def test_many_changes_are_counted() -> None:
    old = recorded()
    old["adam"] = dict.fromkeys(old["adam"], 0.123)
    old["loss"] = dict.fromkeys(old["loss"], 0.123)
    old["grad_scaler"] = {"fp16": dict.fromkeys(old["grad_scaler"]["fp16"], 3)}
    old["lr_scheduler"] = dict.fromkeys(old["lr_scheduler"], 0.123)
    lines = said({}, old)
    assert len(lines) == MOST + 1 and lines[-1].startswith("and ") and lines[-1].endswith(" more")
