"""GGUF files: read with the library's reader, bit for bit, and loaded by transformers' own reader of them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from internevo.commands.convert import convert
from internevo.config.model import Model
from internevo.errors import UsageError
from internevo.models.config import Rope
from internevo.models.families.registry import decoder_config
from internevo.models.huggingface.folder import save_hf
from internevo.models.huggingface.gguf import FORMS, form_of, write_gguf
from internevo.models.huggingface.owned import MARK
from internevo.models.source import ModelInMemory
from internevo.text.tokenizer import train_bpe
from tests.conftest import random_model

SHAPE: dict[str, Any] = {
    "num_layers": 2, "hidden_size": 64, "vocab_size": 320, "num_attention_heads": 4, "num_kv_attention_heads": 2,
    "intermediate_size": 96,
}  # fmt: skip
MOE = {"num_experts": 4, "top_k": 2, "moe_intermediate_size": 32, "moe_type": "Dropless"}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
MORE: dict[str, dict[str, Any]] = {
    "LLAMA2": {"rope_scaling": LLAMA3}, "MIXTRALMOE": {**MOE, "intermediate_size": 32},
    "QWEN3MOE": MOE, "QWEN2MOE": {**MOE, "num_shared_experts": 1},
    "GEMMA3": {"num_layers": 6},
}  # fmt: skip
LOADED = ("LLAMA2", "QWEN2", "QWEN3", "QWEN2MOE", "QWEN3MOE", "GEMMA2", "GEMMA3")
"""Families whose GGUF files transformers loads."""


def model_of(family: str) -> Any:
    torch.manual_seed(0)
    model = random_model(decoder_config(family, Model(**{**SHAPE, **MORE.get(family, {})}))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.2)
    return model


def values(reader: gguf.GGUFReader) -> dict[str, torch.Tensor]:
    """The tensors of a file in fp32, with the shapes of our weights."""
    found = {}
    for tensor in reader.tensors:
        shape = tuple(int(n) for n in reversed(tensor.shape))
        data = np.array(tensor.data)
        if tensor.tensor_type == gguf.GGMLQuantizationType.BF16:
            one = torch.from_numpy(data.view(np.uint8).copy()).view(torch.bfloat16)
        else:
            one = torch.from_numpy(data.copy())
        found[tensor.name] = one.view(shape)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FORMS)
def test_values_are_read_back_bit_for_bit(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    model = model_of(family)
    source = ModelInMemory(model.config, model)
    train_bpe(["def f(x): return x"] * 5, 300, tmp_path / "tokenizer")
    source.tokenizer = tmp_path / "tokenizer"
    write_gguf(source, tmp_path / "out", dtype=dtype)
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    found, config = values(reader), model.config
    state = {name: tensor.detach() for name, tensor in model.named_parameters()}
    assert len(found) == len(state) + (family == "LLAMA2")  # rope_freqs
    q, k = (state[f"layers.1.attn.{name}.weight"] for name in "qk")
    if FORMS[family].permuted:  # llama.cpp rotates neighbours: row 2 i is i of the first half of a head, 2 i + 1 of the second
        half = config.head_dim // 2
        order = torch.arange(config.head_dim).view(2, half).t().flatten()
        q, k = (x.view(-1, config.head_dim, 64)[:, order].reshape(x.shape) for x in (q, k))
    assert torch.equal(found["blk.1.attn_q.weight"], q.to(dtype)) and torch.equal(found["blk.1.attn_k.weight"], k.to(dtype))
    for ours, theirs in (("embed", "token_embd"), ("layers.0.attn.o", "blk.0.attn_output")):
        assert torch.equal(found[f"{theirs}.weight"], state[f"{ours}.weight"].to(dtype))
    mlp, name = ("mlp.experts.down", "ffn_down_exps") if config.experts else ("mlp.down", "ffn_down")
    assert torch.equal(found[f"blk.1.{name}.weight"], state[f"layers.1.{mlp}.weight"].to(dtype))
    norm = state["layers.1.mlp_norm.weight"] + (1 if config.norm_unit_offset else 0)
    assert torch.equal(found["blk.1.ffn_norm.weight"], norm) and norm.dtype == torch.float32
    field = reader.fields[f"{FORMS[family].arch}.attention.head_count_kv"]
    assert field.contents() == 2
    assert reader.fields["tokenizer.ggml.model"].contents() == "gpt2"
    assert len(reader.fields["tokenizer.ggml.tokens"].contents()) == 320


@pytest.mark.parametrize("family", LOADED)
@torch.no_grad()
def test_transformers_reads_the_same_model(tmp_path: Path, family: str) -> None:
    """An independent reader, which undoes what llama.cpp's form changes."""
    model = model_of(family)
    write_gguf(ModelInMemory(model.config, model), tmp_path / "gguf")
    save_hf(model, tmp_path / "hf")  # for the shape, of which transformers does not read all from a GGUF file
    shape = AutoConfig.from_pretrained(tmp_path / "hf")
    theirs: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path / "gguf", gguf_file="model.gguf", config=shape, attn_implementation="eager"
    )
    tokens = torch.randint(0, 320, (2, 9))
    assert (theirs(tokens).logits - model(tokens)).abs().max() < 1e-4


def test_the_command_writes_one_file_and_overwrites_its_own_only(tmp_path: Path) -> None:
    model = model_of("QWEN3")
    save_hf(model, tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "out", "gguf", dtype=torch.float16)
    file = tmp_path / "out" / "model.gguf"
    wanted = file.read_bytes()
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.gguf", MARK}
    with pytest.raises(UsageError, match="is not empty"):
        convert(tmp_path / "hf", tmp_path / "out", "gguf")
    convert(tmp_path / "hf", tmp_path / "out", "gguf", overwrite=True)
    assert file.stat().st_size > len(wanted)  # fp32
    file.write_bytes(b"mine")
    with pytest.raises(UsageError, match=r"model\.gguf was changed after internevo wrote it"):
        convert(tmp_path / "hf", tmp_path / "out", "gguf", overwrite=True)
    assert file.read_bytes() == b"mine"


def test_what_llama_cpp_does_not_have_is_refused_by_name(tmp_path: Path) -> None:
    for family, change, message in (
        ("LLAMA2", {"family": "GLM4"}, "--to gguf does not support GLM4 \\(supported: LLAMA2,"),
        ("LLAMA2", {"rope": Rope(kind="dynamic", factor=2.0)}, "rotary scaling 'dynamic'"),
        ("QWEN2", {"windows": (0, 5)}, "its sliding windows"),
        ("QWEN3", {"qkv_bias": True}, "it has qkv biases"),
        ("GEMMA2", {"query_scale": 0.5}, r"its scores are divided by sqrt\(64\)"),
        ("GEMMA", {"tie_embeddings": False}, "its head is not tied"),
    ):
        config = decoder_config(family, Model(**{**SHAPE, **MORE.get(family, {})}))
        assert form_of(config) is FORMS[family]
        with pytest.raises(UsageError, match=message):
            form_of(replace(config, **change))
