"""Folders whose tensors have different dtypes: each tensor is read in its own dtype, and no value is rounded."""

import json
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from internevo import load_model, save_hf
from internevo.checkpoint import Checkpoint
from internevo.commands.convert import convert
from internevo.commands.inspect import describe
from internevo.models.config import DecoderConfig, Lora
from internevo.models.decoder import Decoder
from internevo.models.huggingface.folder import HfFolder, write_hf
from internevo.models.huggingface.merge import merged
from internevo.models.source import ModelInMemory, dtypes, most_common_dtype
from internevo.storage.tensors import as_rows, joint_dtype
from tests.conftest import random_model
from tests.families import CONFIGS, disk_tensors, pair
from tests.references import REFERENCES, random_folder

KINDS = (torch.float32, torch.bfloat16, torch.float16)
TINY = DecoderConfig(
    family="LLAMA2", vocab_size=30, hidden_size=8, intermediate_size=12, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4
)


def write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def disk(folder: Path) -> dict[str, Tensor]:
    found = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert found
    return found


def parameters(folder: Path) -> list[Tensor]:
    return [parameter.double() for parameter in load_model(folder).parameters()]


@pytest.mark.parametrize("family", [*sorted(CONFIGS), *REFERENCES])
@settings(max_examples=2, deadline=None)
@given(data=st.data(), seed=st.integers(0, 10**6))
def test_every_tensor_is_read_and_kept_in_its_own_dtype(family: str, data: st.DataObject, seed: int) -> None:
    if family in CONFIGS:
        theirs, _ = pair(data.draw(CONFIGS[family]), seed)
        config, tensors = {**theirs.config.to_dict(), "architectures": [type(theirs).__name__]}, disk_tensors(theirs)
        if config["tie_word_embeddings"]:
            tensors.pop("lm_head.weight", None)
    else:
        torch.manual_seed(seed)
        config, tensors = random_folder(family, lambda values: data.draw(st.sampled_from(values)))
    mixed = {name: tensor.to(data.draw(st.sampled_from(KINDS))) for name, tensor in tensors.items()}
    with TemporaryDirectory() as temporary:
        there, ours, back, narrow, wide = (Path(temporary) / name for name in ("there", "ours", "back", "narrow", "wide"))
        write(there, config, mixed)
        convert(there, ours, "internevo", shard_bytes=20_000)
        convert(ours, back, "hf", shard_bytes=20_000)
        found = disk(back)
        assert found.keys() == mixed.keys()
        assert all(torch.equal(found[name].double(), tensor.double()) for name, tensor in mixed.items())
        naming = HfFolder(there).naming
        for name, mappings in naming.by_disk.items():  # experts are joined in one parameter
            parts = {mixed[part.disk].dtype for mapping in mappings for part in naming.by_parameter[mapping.parameter]}
            assert found[name].dtype == (mixed[name].dtype if len(parts) == 1 else torch.float32)
        convert(there, narrow, "hf", dtype=torch.bfloat16)
        for name, tensor in disk(narrow).items():  # biases of routers stay in fp32, as in transformers
            assert torch.equal(tensor, mixed[name].to(torch.float32 if name.endswith("correction_bias") else torch.bfloat16))
        convert(ours, wide, "internevo", dtype=torch.float32)
        assert dtypes(Checkpoint(wide)) == [torch.float32]
        wanted = parameters(there)
        for folder in (ours, back, wide):
            assert all(torch.equal(a, b) for a, b in zip(parameters(folder), wanted, strict=True))


def mixed_model() -> Decoder:
    """Returns a model in bf16, but with norms in fp32 and one matrix in fp16."""
    torch.manual_seed(0)
    model = random_model(TINY)
    for name, parameter in model.named_parameters():
        other = torch.float16 if name.endswith("gate.weight") else torch.bfloat16
        parameter.data = parameter.data.to(torch.float32 if "norm" in name else other)
    return model


def test_a_model_in_memory_keeps_its_dtypes(tmp_path: Path) -> None:
    model = mixed_model()
    save_hf(model, tmp_path / "saved")
    source = HfFolder(tmp_path / "saved")
    for name, parameter in model.named_parameters():
        assert source.dtype_of(name) == parameter.dtype
        rows = source.read(name, 0, as_rows(parameter).shape[0])
        assert torch.equal(rows.view_as(parameter), parameter)
    assert most_common_dtype(source) == torch.bfloat16
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert "torch.bfloat16, some torch.float16, some torch.float32;" in "\n".join(describe(tmp_path / "saved"))
    convert(tmp_path / "saved", tmp_path / "ours", "internevo")
    assert "torch.bfloat16, some torch.float16, some torch.float32\n" in "\n".join(describe(tmp_path / "ours"))


def test_tensors_of_older_bin_files_keep_their_dtypes_too(tmp_path: Path) -> None:
    save_hf(mixed_model(), tmp_path / "saved")
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_text((tmp_path / "saved" / "config.json").read_text())
    torch.save(disk(tmp_path / "saved"), old / "pytorch_model.bin")
    convert(old, tmp_path / "back", "hf")
    found, wanted = disk(tmp_path / "back"), disk(tmp_path / "saved")
    assert all(found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_merged_adapters_do_not_change_the_dtype_of_a_weight(tmp_path: Path) -> None:
    config = replace(TINY, lora=Lora(2, 4.0, ("q",)))
    model = random_model(config)
    for name, parameter in model.named_parameters():
        if "lora" not in name and "norm" not in name:
            parameter.data = parameter.data.bfloat16()
    source = merged(ModelInMemory(config, model))
    write_hf(source, tmp_path / "merged")
    found = HfFolder(tmp_path / "merged")
    assert found.dtype_of("layers.0.attn.q.weight") == found.dtype_of("layers.0.attn.k.weight") == torch.bfloat16
    assert found.dtype_of("norm.weight") == torch.float32
    assert torch.equal(found.read("layers.0.attn.q.weight", 0, 8), source.read("layers.0.attn.q.weight", 0, 8))


def test_the_dtype_of_joined_tensors_holds_every_value_of_each() -> None:
    f8, f16, b16, f32, f64 = torch.float8_e4m3fn, torch.float16, torch.bfloat16, torch.float32, torch.float64
    assert joint_dtype([b16, b16]) == b16
    assert joint_dtype([f16, b16]) == joint_dtype([f8, b16]) == joint_dtype([f32, f16]) == f32
    assert joint_dtype([f64, b16]) == f64
