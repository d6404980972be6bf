"""GGUF files: read with the library's reader, bit for bit, and loaded by transformers' own reader of them."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from internevo.commands.convert import convert
from internevo.config.model import Model
from internevo.errors import UsageError
from internevo.models.config import Rope
from internevo.models.families.registry import decoder_config
from internevo.models.huggingface.folder import save_hf
from internevo.models.huggingface.gguf import write_gguf
from internevo.models.huggingface.gguf_forms import FORMS, form_of
from internevo.models.huggingface.owned import MARK
from internevo.models.source import ModelInMemory
from internevo.text.tokenizer import train_bpe
from tests.conftest import random_model

SHAPE: dict[str, Any] = {
    "num_layers": 2, "hidden_size": 64, "vocab_size": 320, "num_attention_heads": 4, "num_kv_attention_heads": 2,
    "intermediate_size": 96,
}  # fmt: skip
MOE = {"num_experts": 4, "top_k": 2, "moe_intermediate_size": 32, "moe_type": "Dropless"}
LATENT = {
    **MOE, "num_layers": 3, "mlp_only_layers": [0], "num_shared_experts": 2, "num_kv_attention_heads": 4, "kv_lora_rank": 16,
    "qk_nope_head_dim": 24, "qk_rope_head_dim": 8, "v_head_dim": 16, "layer_norm_epsilon": 1e-6,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
LONG = {
    "rope_type": "longrope", "original_max_position_embeddings": 64, "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 3.0, 4.0, 5.0], "partial_rotary_factor": 0.5,
}  # fmt: skip
MORE: dict[str, dict[str, Any]] = {
    "LLAMA2": {"rope_scaling": LLAMA3}, "MIXTRALMOE": {**MOE, "intermediate_size": 32},
    "QWEN3MOE": MOE, "QWEN2MOE": {**MOE, "num_shared_experts": 1}, "GEMMA3": {"num_layers": 6},
    "INTERNLM": {"num_kv_attention_heads": 4}, "INTERNLM3": {"head_dim": 32, "no_bias": False, "mlp_bias": True},
    "BAICHUAN2": {"num_layers": 32, "num_kv_attention_heads": 4}, "SMOLLM3": {"num_layers": 5, "no_rope_layer_interval": 4},
    "GRANITE": {"embedding_multiplier": 7.0, "attention_multiplier": 0.4, "residual_multiplier": 0.3, "logits_scaling": 3.0},
    "PHI3": {"rope_scaling": LONG, "sliding_window": 50, "use_sliding_window": True},
    "DEEPSEEKV2": LATENT, "DEEPSEEKV3": {**LATENT, "q_lora_rank": 24, "n_group": 2, "routed_scaling_factor": 2.5},
}  # fmt: skip
LOADED = ("LLAMA2", "QWEN2", "QWEN3", "QWEN2MOE", "QWEN3MOE", "GEMMA2", "GEMMA3", "PHI3")
"""Families whose GGUF files transformers loads."""


def model_of(family: str) -> Any:
    torch.manual_seed(0)
    model = random_model(decoder_config(family, Model(**{**SHAPE, **MORE.get(family, {})}))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.2)
        for name, tensor in model.stored().items():
            if name.endswith("router.bias"):
                tensor.normal_()
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


def permuted(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp rotates neighbours: row 2 i is i of the first half of a head, 2 i + 1 of the second."""
    return rows.view(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def unpacked(name: str, tensor: torch.Tensor, hf: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Splits tensors as llama.cpp's converters do (conversion/internlm.py, baichuan.py, deepseek.py)."""
    heads = hf["num_attention_heads"]
    keys, size = hf.get("num_key_value_heads", heads), hf["hidden_size"] // heads
    layer = name.partition(".attention.wqkv")[0].partition(".self_attn.")[0]
    if "wqkv" in name:
        groups = tensor.view(keys, heads // keys + 2, size, -1)
        parts = (groups[:, :-2].flatten(0, 2), groups[:, -2].flatten(0, 1), groups[:, -1].flatten(0, 1))
        return {f"{layer}.self_attn.{part}_proj.weight": rows for part, rows in zip("qkv", parts, strict=True)}
    if "W_pack" in name:
        return {f"{layer}.self_attn.{p}_proj.weight": rows for p, rows in zip("qkv", tensor.chunk(3), strict=True)}
    if "kv_b_proj" in name:
        k, v = tensor.unflatten(0, (heads, -1)).split([hf["qk_nope_head_dim"], hf["v_head_dim"]], dim=1)
        return {name.replace("kv_b", "k_b"): k.transpose(1, 2), name.replace("kv_b", "v_b"): v}
    if "shared_expert_gate" in name:
        return {name: tensor[0]}
    return {name.replace("e_score_correction_bias", "e_score_correction.bias"): tensor}


def expected(folder: Path, arch: str) -> dict[str, torch.Tensor]:
    """What llama.cpp's converter makes of a Hugging Face folder: names by the library's own table, values by its rules."""
    hf, found = json.loads((folder / "config.json").read_text()), dict[str, torch.Tensor]()
    experts: dict[str, dict[int, torch.Tensor]] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        for part, value in unpacked(name, tensor, hf).items():
            if expert := re.search(r"\.experts\.(\d+)\.", part):
                merged = part.replace(expert[0], ".experts.")
                if "block_sparse_moe" in merged:
                    merged = merged.removeprefix("model.").replace("block_sparse_moe", "feed_forward")
                experts.setdefault(merged, {})[int(expert[1])] = value
            else:
                found[part] = value
    found |= {name: torch.stack([one for _, one in sorted(parts.items())]) for name, parts in experts.items()}
    heads = hf["num_attention_heads"]
    counts = {"q_proj": heads, "k_proj": hf.get("num_key_value_heads", heads)}
    model = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    table, out = gguf.get_tensor_name_map(model, hf["num_hidden_layers"]), dict[str, torch.Tensor]()
    for name, value in found.items():
        linear = name.split(".")[-2]
        if arch in ("llama", "internlm2", "baichuan", "smollm3", "granite") and linear in counts:
            value = permuted(value, counts[linear])
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            value = value + 1
        if arch == "baichuan" and linear == "lm_head":  # llama.cpp has no head that is divided by its norm
            value = value / value.norm(dim=1, keepdim=True)
        theirs = table.get_name(name, try_suffixes=(".weight", ".bias"))
        assert theirs is not None, name
        out[theirs] = value
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FORMS)
def test_values_are_those_of_llama_cpp_s_converter(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    model = model_of(family)
    source = ModelInMemory(model.config, model)
    train_bpe(["def f(x): return x"] * 5, 300, tmp_path / "tokenizer")
    source.tokenizer = tmp_path / "tokenizer"
    write_gguf(source, tmp_path / "out", dtype=dtype)
    save_hf(model, tmp_path / "hf")
    reader, arch = gguf.GGUFReader(tmp_path / "out" / "model.gguf"), FORMS[family].arch
    found, wanted = values(reader), expected(tmp_path / "hf", arch)
    factors = {name: found.pop(name) for name in list(found) if name.startswith("rope_")}
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        kept = value.dim() == 1 or "ffn_gate_inp" in name
        torch.testing.assert_close(found[name], value.to(torch.float32 if kept else dtype), rtol=0, atol=0, msg=name)
    if family == "PHI3":
        assert factors["rope_factors_long.weight"].tolist() == LONG["long_factor"]
        assert factors["rope_factors_short.weight"].allclose(torch.tensor(LONG["short_factor"]))
    elif family == "LLAMA2":
        shape = AutoConfig.from_pretrained(tmp_path / "hf")
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](shape, "cpu")
        plain = 10000.0 ** -(torch.arange(0, 16, 2) / 16)
        torch.testing.assert_close(plain / factors["rope_freqs.weight"], scaled)
    else:
        assert not factors
    assert reader.fields["tokenizer.ggml.model"].contents() == "gpt2"
    assert len(reader.fields["tokenizer.ggml.tokens"].contents()) == 320


COMMON = {
    "embedding_length": "hidden_size", "block_count": "num_hidden_layers", "feed_forward_length": "intermediate_size",
    "vocab_size": "vocab_size", "attention.head_count": "num_attention_heads", "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim", "attention.value_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps", "context_length": "max_position_embeddings",
    "expert_count": ("num_experts", "num_local_experts", "n_routed_experts"),
    "expert_used_count": "num_experts_per_tok", "rope.freq_base": "rope_theta",
}  # fmt: skip
LATENTS = {
    "attention.q_lora_rank": "q_lora_rank", "attention.kv_lora_rank": "kv_lora_rank", "attention.value_length": "kv_lora_rank",
    "attention.value_length_mla": "v_head_dim", "rope.dimension_count": "qk_rope_head_dim",
    "leading_dense_block_count": "first_k_dense_replace", "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_count": "n_shared_experts", "expert_weights_scale": "routed_scaling_factor",
    "expert_weights_norm": "norm_topk_prob",
}  # fmt: skip
"""The key of a config.json that each key of a file is from (TextModel and DeepseekV2Model of llama.cpp's converter)."""
VALUES: dict[str, dict[str, Any]] = {
    "PHI3": {
        "attention.sliding_window": 50, "rope.dimension_count": 8, "rope.scaling.original_context_length": 64,
        "rope.scaling.attn_factor": math.sqrt(1 + math.log(2048 / 64) / math.log(64)),
    },
    "GRANITE": {"embedding_scale": 7.0, "attention.scale": 0.4, "residual_scale": 0.3, "logit_scale": 3.0},
    "GLM": {"rope.dimension_count": 8}, "GLM4": {"rope.dimension_count": 8}, "INTERNLM3": {"rope.dimension_count": 32},
    "DEEPSEEKV2": {
        "attention.head_count_kv": 1, "attention.key_length": 24, "attention.key_length_mla": 32, "expert_gating_func": 1,
        "expert_group_count": None, "attention.q_lora_rank": 0,
    },
    "DEEPSEEKV3": {
        "attention.head_count_kv": 1, "attention.key_length": 24, "attention.key_length_mla": 32, "expert_gating_func": 2,
        "expert_group_count": 2, "expert_group_used_count": 1,
    },
}  # fmt: skip


@pytest.mark.parametrize("family", FORMS)
def test_keys_are_those_of_the_config(tmp_path: Path, family: str) -> None:
    model, arch = model_of(family), FORMS[family].arch
    write_gguf(ModelInMemory(model.config, model), tmp_path / "out")
    save_hf(model, tmp_path / "hf")
    hf = json.loads((tmp_path / "hf" / "config.json").read_text())
    fields = gguf.GGUFReader(tmp_path / "out" / "model.gguf").fields
    found = {key.removeprefix(f"{arch}."): field.contents() for key, field in fields.items() if key.startswith(f"{arch}.")}
    known = [value for part in vars(gguf.Keys).values() if isinstance(part, type) for value in vars(part).values()]
    assert {f"{{arch}}.{key}" for key in found} <= set(known)
    wanted: dict[str, Any] = {}
    for key, theirs in {**COMMON, **(LATENTS if arch == "deepseek2" else {})}.items():
        names = (theirs,) if isinstance(theirs, str) else theirs
        if given := [hf[name] for name in names if hf.get(name) is not None]:
            wanted[key] = given[0]
    for key, value in {**wanted, **VALUES.get(family, {})}.items():
        assert found.get(key) == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value), key


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("family", "options", "factor", "weight"),
    [
        ("LLAMA2", {}, 1.0, None),  # llama.cpp multiplies it by 1 + 0.1 log(factor)
        ("LLAMA2", {"attention_factor": 1.4}, 1.4 / (1 + 0.1 * math.log(4)), None),
        ("DEEPSEEKV2", {"mscale": 0.7, "mscale_all_dim": 0.7}, 1.0, 0.07),  # 0.1 mscale_all_dim, as its converter has it
        ("DEEPSEEKV3", {"mscale": 1.0, "mscale_all_dim": 1.0}, 1.0, 0.1),
    ],
)
def test_yarn_scales_as_in_llama_cpp(
    tmp_path: Path, family: str, options: dict[str, Any], factor: float, weight: float | None
) -> None:
    config = decoder_config(family, Model(**{**SHAPE, **MORE[family], "rope_scaling": {**YARN, **options}}))
    write_gguf(ModelInMemory(config, random_model(config)), tmp_path / "out")
    fields = gguf.GGUFReader(tmp_path / "out" / "model.gguf").fields
    prefix = f"{FORMS[family].arch}.rope.scaling"
    assert fields[f"{prefix}.type"].contents() == "yarn" and fields[f"{prefix}.factor"].contents() == 4.0
    assert fields[f"{prefix}.original_context_length"].contents() == 64
    assert fields[f"{prefix}.attn_factor"].contents() == pytest.approx(factor, rel=1e-6)
    found = fields.get(f"{prefix}.yarn_log_multiplier")
    assert (found and found.contents()) == (weight and pytest.approx(weight, rel=1e-5))


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
        ("LLAMA2", {"family": "NEW"}, "--to gguf does not support NEW \\(supported: LLAMA2,"),
        ("LLAMA2", {"rope": Rope(kind="longrope")}, "rotary scaling 'longrope'"),
        ("LLAMA2", {"rope": None}, "it has ALiBi"),
        ("LLAMA2", {"rope": Rope(kind="yarn", options={"beta_fast": 16})}, "YaRN with another beta_fast"),
        ("QWEN3", {"rope": Rope(kind="llama3")}, "rotary scaling 'llama3'"),
        ("QWEN2", {"head_dim": 32}, "its 4 heads of 32 do not have the hidden size 64 together"),
        ("BAICHUAN2", {"num_layers": 31}, "it has 31 layers, and llama.cpp uses the rotary embedding only in models of 32"),
        ("BAICHUAN2", {"rope": None}, "it has 32 layers, and llama.cpp uses ALiBi only in models of 40"),
        ("BAICHUAN2", {"tie_embeddings": True}, "its head is tied"),
        ("PHI3", {"windows": (0, 5)}, "its sliding windows"),
        ("MISTRAL", {"windows": (5, 5)}, "its sliding windows"),
        ("SMOLLM3", {"windows": (0, 0, 0, 5, 0)}, "its sliding windows"),
        ("SMOLLM3", {"layers_without_rope": (1, 3)}, r"its layers \[1, 3\] have no rotary embedding, and in llama.cpp \[3\]"),
        ("LLAMA2", {"layers_without_rope": (1,)}, r"its layers \[1\] have no rotary embedding"),
        ("DEEPSEEKV3", {"num_layers": 27}, "27 layers, by which llama.cpp takes it for a model without q_lora_rank"),
        ("DEEPSEEKV3", {"norm_eps": 1e-5}, "the norms of its latents"),
        ("DEEPSEEKV3", {"qkv_bias": True}, "it has qkv biases"),
        ("QWEN2", {"windows": (0, 5)}, "its sliding windows"),
        ("QWEN3", {"qkv_bias": True}, "it has qkv biases"),
        ("GEMMA2", {"query_scale": 0.5}, r"its scores are divided by sqrt\(64\)"),
        ("GEMMA2", {"logit_softcap": 0.0}, "its scores and logits have caps of 50.0 and 0.0"),
        ("GEMMA", {"tie_embeddings": False}, "its head is not tied"),
    ):
        config = decoder_config(family, Model(**{**SHAPE, **MORE.get(family, {})}))
        assert form_of(config) is FORMS[family]
        with pytest.raises(UsageError, match=message):
            form_of(replace(config, **change))


def test_experts_that_llama_cpp_does_not_have_are_refused() -> None:
    config = decoder_config("DEEPSEEKV2", Model(**{**SHAPE, **LATENT}))
    assert config.experts is not None
    for change, message in (
        ({"dense_layers": (1,)}, r"the layers without experts \[1\] are not the first ones"),
        ({"shared_size": 40}, "the size of its shared experts 40 is not a multiple"),
        ({"groups": 2}, "choose a group of experts by the largest score"),
    ):
        with pytest.raises(UsageError, match=message):
            form_of(replace(config, experts=replace(config.experts, **change)))
    mixtral = decoder_config("MIXTRALMOE", Model(**{**SHAPE, **MORE["MIXTRALMOE"]}))
    with pytest.raises(UsageError, match="its experts choose in another way"):
        form_of(replace(mixtral, experts=replace(config.experts, balance_bias=True)))
