"""Folders that cannot be read right are refused by an error that names the file, and the field or tensor."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from internevo import load_model, save_hf
from internevo.commands.convert import convert
from internevo.errors import UsageError
from internevo.models.config import DecoderConfig
from internevo.models.huggingface.folder import HfFolder
from tests.conftest import random_model

TINY = DecoderConfig(
    family="LLAMA2", vocab_size=30, hidden_size=8, intermediate_size=12, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small Llama in one file."""
    torch.manual_seed(0)
    save_hf(random_model(TINY), tmp_path / "hf")
    return tmp_path / "hf"


@pytest.fixture
def sharded(folder: Path) -> Path:
    """The same model in several files."""
    save_hf(load_model(folder), folder.parent / "sharded", max_shard_size=1500)
    return folder.parent / "sharded"


def refused(folder: Path, *parts: str) -> None:
    """``convert`` and ``load_model`` refuse a folder, and write nothing."""
    before = sorted(folder.parent.iterdir())
    for act in (load_model, lambda folder: convert(folder, folder.parent / "out", "internevo")):
        with pytest.raises(UsageError) as caught:
            act(folder)
        assert all(part in str(caught.value) for part in parts), caught.value
    assert sorted(folder.parent.iterdir()) == before


# config.json ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[]", b"3", b'"x"', b"null", b"\xff\xfe", b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"],
    ids=lambda t: t[:6],
)
def test_a_config_that_is_no_json_object_is_named(folder: Path, text: bytes) -> None:
    (folder / "config.json").write_bytes(text)
    refused(folder, f"{folder}/config.json is ")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "8"}, "hidden_size = '8' must be a whole number of at least 1"),
        ({"num_hidden_layers": 2.0}, "num_hidden_layers = 2.0 must be a whole number"),
        ({"num_hidden_layers": True}, "num_hidden_layers = True must be a whole number"),
        ({"vocab_size": None}, "vocab_size = None must be a whole number"),
        ({"vocab_size": -30}, "vocab_size = -30 must be a whole number of at least 1"),
        ({"num_attention_heads": [2]}, "num_attention_heads = [2] must be a whole number"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps = '1e-5' must be a number above 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps = nan must be a number above 0"),
        ({"rope_theta": float("inf")}, "rope_theta = inf must be a number above 0"),
        ({"rope_theta": "10000", "rope_parameters": None}, "rope_theta = '10000' must be a number above 0"),
        ({"rope_scaling": "linear"}, "rope_scaling: 'linear' is not an object with keys"),
        ({"rope_scaling": {"type": "linear", "facter": 2}}, "'facter' is not a key of 'linear'"),
        ({"attention_bias": "false"}, "attention_bias = 'false' must be true or false"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings = 1 must be true or false"),
        ({"num_key_value_heads": 3}, "num_attention_heads = 2 is not a multiple of num_key_value_heads = 3"),
        ({"head_dim": 3}, "head_dim = 3 must be even"),
        ({"head_dim": None, "hidden_size": 7}, "hidden_size = 7 is not a multiple of num_attention_heads = 2"),
        ({"architectures": "LlamaForCausalLM"}, "architectures = 'LlamaForCausalLM' must be a list of names"),
        ({"architectures": [3]}, "architectures = [3] must be a list of names"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config = {'quant_method': 'gptq'} does not fit"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not supported for LLAMA2"),
        ({"model_type": ["llama"]}, "no family fits model_type = ['llama']"),
        ({"layer_types": ["chunked_attention"] * 2}, "layer_types = "),
    ],
    ids=str,
)  # fmt: skip
def test_a_value_of_the_wrong_type_is_named(folder: Path, changes: dict[str, Any], message: str) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    refused(folder, str(folder), message)


def test_all_wrong_values_are_named_at_once(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "hidden_size": "8", "vocab_size": "30"}))
    refused(folder, "hidden_size = '8'", "vocab_size = '30'")


def test_without_architectures_the_model_type_says_the_family(folder: Path) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text())
    without = {key: value for key, value in values.items() if key != "architectures"}
    forms: list[dict[str, Any]] = [without, {**without, "architectures": None}, {**without, "architectures": []}]
    for form in forms:
        path.write_text(json.dumps(form))
        load_model(folder)
    path.write_text(json.dumps({k: v for k, v in values.items() if k not in ("architectures", "model_type")}))
    refused(folder, "no family fits architectures = None")


@pytest.mark.parametrize("rotary", [{"type": "linear"}, {"base": "100"}, {"base": 100, "scale": 2}, "dynamic"], ids=str)
def test_internlms_rotary_has_a_known_type_and_a_base(folder: Path, rotary: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "internlm", "rotary": rotary}))
    refused(folder, "config.json: r")


# Weights -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool, torch.int64])
def test_weights_that_are_no_floating_point_numbers_are_refused(folder: Path, dtype: torch.dtype) -> None:
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({**weights, name: weights[name].to(dtype)}, folder / "model.safetensors")
    refused(folder, f"tensor {name} has dtype {str(dtype).removeprefix('torch.')}; weights must be floating-point numbers")


def index_of(sharded: Path) -> tuple[Path, dict[str, Any]]:
    path = sharded / "model.safetensors.index.json"
    return path, json.loads(path.read_text())


def test_shards_without_an_index_are_named(sharded: Path) -> None:
    index_of(sharded)[0].unlink()
    refused(sharded, "model-00001-of-0000", "model.safetensors.index.json is not")


def test_missing_shards_are_all_named(sharded: Path) -> None:
    files = sorted(sharded.glob("model-*.safetensors"))
    for file in files[:2]:
        file.unlink()
    refused(sharded, "model.safetensors.index.json names", files[0].name, files[1].name)


def test_a_shard_that_is_cut_short_is_named(sharded: Path) -> None:
    file = sorted(sharded.glob("model-*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-1])
    refused(sharded, f"{file} is not a safetensors file")


def test_a_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    first, second = sorted(sharded.glob("model-*.safetensors"))[:2]
    name, tensor = next(iter(load_file(first).items()))
    save_file({**load_file(second), name: tensor + 1}, second)
    refused(sharded, f"{second} has a tensor {name!r}, but model.safetensors.index.json says that it is in {first.name}")


def test_a_tensor_that_the_index_does_not_have_is_refused(sharded: Path) -> None:
    path, values = index_of(sharded)
    name = next(iter(values["weight_map"]))
    del values["weight_map"][name]
    path.write_text(json.dumps(values))
    refused(sharded, f"has a tensor {name!r}, but model.safetensors.index.json does not have it")


def test_a_tensor_that_is_not_in_its_shard_is_refused(sharded: Path) -> None:
    file = sorted(sharded.glob("model-*.safetensors"))[0]
    name = next(iter(load_file(file)))
    save_file({n: t for n, t in load_file(file).items() if n != name}, file)
    refused(sharded, f"{file} has no tensor {name!r}, although the index says so")


@pytest.mark.parametrize("weight_map", [None, [], "x", {"a": 3}, {"a": "../hf/x"}, {"a": "/etc/passwd"}], ids=str)
def test_an_index_that_is_none_is_named(sharded: Path, weight_map: Any) -> None:
    path, values = index_of(sharded)
    path.write_text(json.dumps({**values, "weight_map": weight_map}))
    refused(sharded, f"{path} is not an index of weights")


@pytest.mark.parametrize(
    "content",
    [
        lambda w: [w], lambda w: {"model": w}, lambda w: {**w, "step": 3}, lambda w: {**w, "x": torch.eye(2).to_sparse()},
        lambda w: torch.ones(3),
    ],
    ids=["list", "nested", "number", "sparse", "tensor"],
)  # fmt: skip
def test_a_bin_file_of_other_objects_is_refused(folder: Path, content: Callable[[dict[str, Tensor]], Any]) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(content(weights), folder / "pytorch_model.bin")
    refused(folder, f"{folder}/pytorch_model.bin is refused")


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04"], ids=str)
def test_a_damaged_bin_file_is_refused(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(content)
    refused(folder, f"{folder}/pytorch_model.bin is refused")


def test_the_oldest_form_of_bin_files_is_read(folder: Path) -> None:
    model, weights = load_model(folder), load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert all(torch.equal(a, b) for a, b in zip(load_model(folder).parameters(), model.parameters(), strict=True))


# A tied head ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own_head", [True, False])
def test_a_head_that_differs_from_the_embedding_is_not_tied_as_in_transformers(folder: Path, own_head: bool) -> None:
    from transformers import AutoModelForCausalLM

    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": True}))
    weights = load_file(folder / "model.safetensors")
    if not own_head:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    tokens = torch.randint(0, 30, (1, 9))
    assert (load_model(folder)(tokens) - theirs(tokens).logits).abs().max() < 1e-5
    assert HfFolder(folder).config.tie_embeddings is not own_head
    convert(folder, folder.parent / "out", "hf")
    assert json.loads((folder.parent / "out" / "config.json").read_text())["tie_word_embeddings"] is not own_head
    assert ("lm_head.weight" in load_file(folder.parent / "out" / "model.safetensors")) == own_head
    assert (load_model(folder.parent / "out")(tokens) - theirs(tokens).logits).abs().max() < 1e-5
