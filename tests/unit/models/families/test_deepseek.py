"""DeepSeek's folders: biases keep fp32, layers of multi-token prediction are left out, quantised weights are refused."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from internevo import load_model, save_hf
from internevo.commands.convert import convert
from internevo.config.model import Model
from internevo.errors import UsageError
from internevo.models.decoder import Decoder
from internevo.models.families.registry import decoder_config, problems
from tests.conftest import random_model

SHAPE: dict[str, Any] = {
    "num_layers": 2, "hidden_size": 32, "vocab_size": 97, "num_attention_heads": 4, "intermediate_size": 48, "kv_lora_rank": 16,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "num_experts": 4, "top_k": 2, "num_shared_experts": 1,
    "moe_intermediate_size": 12, "mlp_only_layers": (0,), "moe_type": "Dropless",
}  # fmt: skip


def model_with_biases() -> Decoder:
    torch.manual_seed(0)
    model = random_model(decoder_config("DEEPSEEKV3", Model(**SHAPE)))
    model.stored()["layers.1.mlp.router.bias"].copy_(torch.tensor([0.1001, -0.2003, 0.3007, 0.0]))
    return model.eval()


def test_balance_biases_go_to_folders_and_back_in_fp32(tmp_path: Path) -> None:
    model = model_with_biases()
    save_hf(model, tmp_path / "hf", dtype=torch.bfloat16)
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    stored = load_file(tmp_path / "hf" / "model.safetensors")
    assert stored[name].dtype == torch.float32 and stored["lm_head.weight"].dtype == torch.bfloat16
    convert(tmp_path / "hf", tmp_path / "ours", "internevo", dtype=torch.float16)
    convert(tmp_path / "ours", tmp_path / "back", "hf")
    again = load_model(tmp_path / "back").stored()["layers.1.mlp.router.bias"]
    assert torch.equal(again, model.stored()["layers.1.mlp.router.bias"])
    with pytest.raises(UsageError, match="Qwen2MoeForCausalLM"):
        convert(tmp_path / "ours", tmp_path / "other", "hf", write_as="QWEN2MOE")


def test_layers_for_more_tokens_are_left_out_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, tokens = model_with_biases(), torch.arange(9).unsqueeze(0)
    save_hf(model, tmp_path)
    path, weights = tmp_path / "config.json", load_file(tmp_path / "model.safetensors")
    values = json.loads(path.read_text())
    save_file({**weights, "model.layers.2.eh_proj.weight": torch.zeros(3, 3)}, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match=r"has a tensor 'model\.layers\.2\.eh_proj\.weight'"):
        load_model(tmp_path)
    path.write_text(json.dumps({**values, "num_nextn_predict_layers": 1}))
    with caplog.at_level(logging.WARNING, "internevo"):
        loaded = load_model(tmp_path)
    assert "left out 1 tensor of the layers" in caplog.text and "model.layers.2.eh_proj.weight" in caplog.text
    assert torch.equal(loaded(tokens), model(tokens))
    path.write_text(json.dumps({**values, "quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(UsageError, match="quantization_config"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v_head_dim": 13}, "model.v_head_dim = 13 is greater than qk_nope_head_dim \\+ qk_rope_head_dim = 12"),
        ({"qk_rope_head_dim": 3, "v_head_dim": 8}, "model.qk_rope_head_dim = 3 must be even"),
        ({"kv_lora_rank": None}, "needs model.kv_lora_rank"),
        ({"head_dim": 16}, "model.head_dim is not supported"),
        ({"num_kv_attention_heads": 2}, "model.num_kv_attention_heads is not supported"),
        ({"n_group": 3}, "model.num_experts = 4 is not a multiple of model.n_group = 3"),
        ({"n_group": 2, "topk_group": 3}, "model.topk_group = 3 is greater than model.n_group = 2"),
        ({"n_group": 4, "topk_group": 1}, "model.top_k = 2 is greater than 1|needs at least 2 of the 4 experts"),
        ({"lora": {"targets": ["q", "v"]}}, "has no linears k and v"),
        ({"use_sliding_window": True, "sliding_window": 4}, "model.use_sliding_window = True is not supported"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    found = list(problems("DEEPSEEKV3", Model(**{**SHAPE, **change})))
    assert any(re.search(message, line) for line in found), found
