"""Compares InternLM, InternLM2 and Baichuan2 with references from their published descriptions, and with Llama."""

import itertools
from typing import Any

import pytest
import torch
import transformers as tf
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from internevo.models.decoder import Decoder
from internevo.models.families.registry import decoder_from_hf
from tests.families import load_disk_tensors, to_disk
from tests.references import REFERENCES, random_folder, slopes


def build(family: str, data: st.DataObject, seed: int) -> tuple[dict[str, Any], dict[str, Tensor], Decoder]:
    torch.manual_seed(seed)
    config, disk = random_folder(family, lambda values: data.draw(st.sampled_from(values)))
    model = Decoder(decoder_from_hf(config, "test"))
    load_disk_tensors(model, disk)
    return config, disk, model


@pytest.mark.parametrize("family", REFERENCES)
@settings(max_examples=15, deadline=None)
@given(data=st.data(), seed=st.integers(0, 10**6), sizes=st.lists(st.integers(1, 20), min_size=1, max_size=3))
def test_logits_and_gradients_equal_the_reference(family: str, data: st.DataObject, seed: int, sizes: list[int]) -> None:
    config, disk, model = build(family, data, seed)
    documents = [torch.randint(0, config["vocab_size"], (n,)) for n in sizes]
    for tensor in disk.values():
        tensor.requires_grad_()
    wanted = torch.cat([REFERENCES[family](disk, config, d) for d in documents])
    boundaries = torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32)
    tokens = torch.cat(documents).unsqueeze(0)
    assert (model(tokens, cu_seqlens=boundaries)[0] - wanted).abs().max() < 1e-5
    labels = torch.randint(0, config["vocab_size"], tokens.shape)
    loss = model(tokens, cu_seqlens=boundaries, labels=labels)
    expected = torch.nn.functional.cross_entropy(wanted, labels[0], reduction="sum")
    assert abs(loss.total - expected) <= 1e-5 * expected
    loss.total.backward()
    expected.backward()
    mine = to_disk(model, {k: v.grad for k, v in model.named_parameters() if v.grad is not None})
    gradients = {name: tensor.grad for name, tensor in disk.items() if tensor.grad is not None}
    assert gradients.keys() == disk.keys()
    # Some gradients are zero except for rounding errors (q, if documents have one token), which depend on the largest gradient.
    noise = 1e-7 * max(1.0, *(float(gradient.abs().max()) for gradient in gradients.values()))
    for name, gradient in gradients.items():
        assert (mine[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max() + noise, name


@pytest.mark.parametrize("family", REFERENCES)
@settings(max_examples=5, deadline=None)
@given(data=st.data(), seed=st.integers(0, 10**6))
def test_with_llamas_names_on_disk_they_equal_llama(family: str, data: st.DataObject, seed: int) -> None:
    _, _, model = build(family, data, seed)
    assume(model.config.rope is not None)  # Llama does not have ALiBi
    c, rope = model.config, model.config.rope
    assert rope is not None
    llama = tf.LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_layers, num_attention_heads=c.num_heads, num_key_value_heads=c.num_kv_heads,
        rms_norm_eps=c.norm_eps, attention_bias=c.qkv_bias, max_position_embeddings=c.max_position_embeddings,
        rope_parameters={"rope_type": rope.kind, "rope_theta": rope.base, "factor": rope.factor},
    )  # fmt: skip
    theirs = tf.LlamaForCausalLM(llama).eval()
    weights = {}
    for name, parameter in model.named_parameters():
        new = name.replace("embed.", "embed_tokens.").replace(".attn_norm.", ".input_layernorm.")
        new = new.replace(".mlp_norm.", ".post_attention_layernorm.").replace(".attn.", ".self_attn.")
        for part in ("q", "k", "v", "o", "gate", "up", "down"):
            new = new.replace(f".{part}.", f".{part}_proj.")
        weights[f"model.{new}" if name != "head.weight" else "lm_head.weight"] = parameter.detach()
    if c.norm_head:
        weights["lm_head.weight"] = weights["lm_head.weight"] / weights["lm_head.weight"].norm(dim=1, keepdim=True)
    theirs.load_state_dict(weights)
    tokens = torch.randint(0, c.vocab_size, (2, 20))
    assert (model(tokens) - theirs(tokens).logits).abs().max() < 1e-5


@pytest.mark.parametrize("heads", [1, 4, 6, 8, 40])
def test_alibi_slopes_are_those_of_the_paper(heads: int) -> None:
    from internevo.models.layers import alibi_slopes

    torch.testing.assert_close(alibi_slopes(heads, torch.device("cpu")), torch.tensor(slopes(heads)))
