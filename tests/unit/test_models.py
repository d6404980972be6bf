"""Models equal transformers' Llama, and packed documents equal separate ones."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from internevo.models import Decoder, llama
from internevo.models.hf import read_tensors
from internevo.ops import cross_entropy

SCALINGS = [
    None,
    {"rope_type": "linear", "factor": 3.0},
    {"rope_type": "dynamic", "factor": 2.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
]


@st.composite
def shapes(draw):
    kv = draw(st.sampled_from([1, 2, 3]))
    head_dim = draw(st.sampled_from([4, 8, 16]))
    return dict(
        num_attention_heads=kv * draw(st.sampled_from([1, 2, 4])),
        num_key_value_heads=kv,
        head_dim=head_dim,
        hidden_size=draw(st.sampled_from([24, 48, 72])),
        intermediate_size=draw(st.sampled_from([17, 48])),
        vocab_size=draw(st.sampled_from([67, 128, 131])),
        num_hidden_layers=draw(st.integers(1, 3)),
        attention_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
        tie_word_embeddings=draw(st.booleans()),
        rms_norm_eps=draw(st.sampled_from([1e-3, 1e-6])),
        rope_theta=draw(st.sampled_from([100.0, 10000.0])),
        max_position_embeddings=16,
        rope_scaling=draw(st.sampled_from(SCALINGS)),
    )


def pair(shape, seed):
    """The same random weights in transformers and here."""
    torch.manual_seed(seed)
    theirs = LlamaForCausalLM(
        LlamaConfig(**{k: v for k, v in shape.items() if v is not None}, attn_implementation="eager")
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # far from ones and zeros, so that a lost bias or gain shows
            parameter.copy_(torch.randn_like(parameter) * (0.2 if parameter.dim() == 1 else 0.08))
            parameter.add_(1.0 if parameter.dim() == 1 else 0.0)
    config = llama.from_hf(theirs.config.to_dict())
    ours = Decoder(config)
    weights = dict(theirs.state_dict().items())
    parameters = dict(ours.named_parameters())
    with torch.no_grad():
        for name, tensor in read_tensors(weights, llama.entries(config)):
            parameters[name].copy_(tensor)
    return theirs, ours


@settings(max_examples=40, deadline=None)
@given(shape=shapes(), seed=st.integers(0, 10**6), length=st.sampled_from([5, 24]))
def test_logits_loss_and_gradients_equal_transformers(shape, seed, length):
    theirs, ours = pair(shape, seed)
    tokens = torch.randint(0, shape["vocab_size"], (2, length))
    expected = theirs(tokens, labels=tokens)
    logits = ours(tokens)
    assert (logits - expected.logits).abs().max() < 1e-5
    labels = torch.cat([tokens[:, 1:], torch.full((2, 1), -100)], dim=1)
    total, losses = ours(tokens, labels=labels)
    count = (labels != -100).sum()
    assert abs(total / count - expected.loss) < 1e-5
    torch.testing.assert_close(losses.sum(), total)
    (total / count).backward()
    expected.loss.backward()
    grads = {k: v.grad for k, v in theirs.named_parameters()}
    mine = {k: v.grad for k, v in ours.named_parameters()}
    for entry in llama.entries(ours.config):
        wanted = grads[entry.disk]
        assert (mine[entry.parts[0]] - wanted).abs().max() <= 1e-4 * wanted.abs().max() + 1e-7, entry.disk


@settings(max_examples=30, deadline=None)
@given(shape=shapes(), seed=st.integers(0, 10**6), sizes=st.lists(st.integers(1, 24), min_size=1, max_size=5))
def test_packed_documents_equal_separate_ones(shape, seed, sizes):
    _, model = pair(shape, seed)
    documents = [torch.randint(0, shape["vocab_size"], (1, n)) for n in sizes]
    borders = torch.tensor([0, *torch.tensor(sizes).cumsum(0)], dtype=torch.int32)
    packed = model(torch.cat(documents, dim=1), cu_seqlens=borders)
    separate = torch.cat([model(d) for d in documents], dim=1)
    assert (packed - separate).abs().max() < 1e-5
    if len(sizes) > 1 and min(sizes) > 3:
        leaking = model(torch.cat(documents, dim=1))
        assert (leaking - separate).abs().max() > 1e-3  # the comparison can fail


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("chunk_tokens", [1, 3, 100])
def test_chunked_loss_equals_pytorch(monkeypatch, smoothing, chunk_tokens):

    monkeypatch.setitem(cross_entropy.CHUNK_BYTES, "cpu", 4 * 31 * chunk_tokens)
    monkeypatch.setattr(cross_entropy, "BLOCK", 7)
    torch.manual_seed(0)
    hidden = torch.randn(10, 8, requires_grad=True)
    weight = torch.randn(31, 8, requires_grad=True)
    labels = torch.randint(0, 31, (10,))
    labels[2] = labels[7] = -100
    total, losses = cross_entropy.linear_cross_entropy(hidden, weight, labels, smoothing)
    wanted = torch.nn.functional.cross_entropy(hidden @ weight.t(), labels, reduction="sum", label_smoothing=smoothing)
    torch.testing.assert_close(total, wanted)
    assert losses[2] == 0 and losses[7] == 0
    grads = torch.autograd.grad(total * 0.3, (hidden, weight))
    for mine, reference in zip(grads, torch.autograd.grad(wanted * 0.3, (hidden, weight)), strict=True):
        torch.testing.assert_close(mine, reference, atol=1e-6, rtol=1e-5)
