"""Shared by unit tests."""

from pathlib import Path

import pytest


@pytest.fixture
def llama_folder(tmp_path: Path) -> Path:
    """A small Llama with a tokenizer, as transformers writes it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from internevo.text.tokenizer import train_bpe

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "hf")
    train_bpe(["def f(x): return x"] * 5, 300, tmp_path / "hf")
    return tmp_path / "hf"
