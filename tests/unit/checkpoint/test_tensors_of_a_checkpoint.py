"""The tensors of a checkpoint are those of its model: none is missing, and none is left over."""

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest

from internevo import load_model
from internevo.checkpoint import Checkpoint
from internevo.checkpoint.manifest import Manifest, TensorEntry
from internevo.errors import CheckpointError, UsageError
from internevo.models.config import DecoderConfig, Lora
from internevo.models.decoder import parameter_shapes

TINY = DecoderConfig("LLAMA2", 30, 8, 12, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4)
EXTRA = "layers.2.mlp.up.weight"


def checkpoint(folder: Path, names: Iterable[str], config: DecoderConfig = TINY) -> Checkpoint:
    """A checkpoint without files: only what is known before any is read."""
    shapes = {**parameter_shapes(config), EXTRA: parameter_shapes(config)["layers.1.mlp.up.weight"]}
    tensors = {f"model/{name}": TensorEntry("float32", list(shapes[name]), []) for name in names}
    for name in names:
        tensors[f"optimizer/{name}.exp_avg"] = TensorEntry("float32", list(shapes[name]), [])
    Manifest(3, {}, {}, {}, tensors).write(folder)
    (folder / "model.json").write_text(json.dumps(config.to_dict()))
    return Checkpoint(folder)


def test_missing_tensors_and_those_that_nothing_uses_are_errors(tmp_path: Path) -> None:
    names = parameter_shapes(TINY)
    both = ("model/", "optimizer/")
    checkpoint(tmp_path, names).check_tensors(TINY, both)
    checkpoint(tmp_path, names).check_tensors(replace(TINY, lora=Lora(2, 4.0, ("q",))), ("model/",))  # new adapters
    with pytest.raises(CheckpointError, match=f"has a tensor that its model does not use: model/{EXTRA} and 1 more: "):
        checkpoint(tmp_path, [*names, EXTRA]).check_tensors(TINY, both)
    with pytest.raises(CheckpointError, match=f"has a tensor that its model does not use: optimizer/{EXTRA}.exp_avg: "):
        checkpoint(tmp_path, [*names, EXTRA]).check_tensors(TINY, ("optimizer/",))
    with pytest.raises(CheckpointError, match="does not have the tensor model/head.weight: "):
        checkpoint(tmp_path, [name for name in names if name != "head.weight"]).check_tensors(TINY)
    with pytest.raises(CheckpointError, match="has another shape of the tensor model/layers.0.mlp.down.weight and 5 more: "):
        checkpoint(tmp_path, names).check_tensors(replace(TINY, intermediate_size=13))


def test_a_model_that_its_description_does_not_fit_is_not_loaded(tmp_path: Path) -> None:
    checkpoint(tmp_path, [*parameter_shapes(TINY), EXTRA])
    with pytest.raises(CheckpointError, match="has a tensor that its model does not use"):
        load_model(tmp_path)
    (tmp_path / "model.json").write_text("{}")
    with pytest.raises(CheckpointError, match="model.json does not describe a model: KeyError: 'rope'"):
        load_model(tmp_path)


def test_a_source_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(UsageError, match="is a file; give its folder"):
        load_model(tmp_path / "model.safetensors")
