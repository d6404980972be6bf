"""Experts: routing under capacity, grouped products, windows and ALiBi, against plain loops."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from internevo import ops
from internevo.models.config import DecoderConfig, Experts
from internevo.models.decoder import Decoder
from internevo.models.moe import MoE
from tests.references import plain_attention


def tiny(experts):
    return DecoderConfig("MIXTRALMOE", 50, 16, experts.size, 1, 2, 2, 8, experts=experts)


def make(experts, seed):
    torch.manual_seed(seed)
    layer = MoE(tiny(experts), experts, None, None)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return layer


def assert_equal(mine, reference, tolerance=1e-5):
    """On the scale of the largest element, where that is more than 1."""
    assert (mine - reference).abs().max() <= tolerance * max(1.0, reference.abs().max())


def expert(layer, number, x):
    """One expert of a layer on one token."""
    gate, up, down = (getattr(layer.experts, part).weight[number] for part in ("gate", "up", "down"))
    return down @ (F.silu(gate @ x) * (up @ x))


def gshard(layer, experts, tokens, factor):
    """The paper's algorithm, a token at a time: all first choices before all second ones; who comes too late gets nothing.
    Returns the output and the number of choices left out."""
    probs = (tokens @ layer.router.weight.T).softmax(-1)
    chosen, which = probs.topk(experts.top_k)
    weights = chosen / chosen.sum(1, keepdim=True) if experts.normalize else chosen
    capacity = max(experts.min_capacity, math.ceil(len(tokens) * experts.top_k / experts.count * factor))
    room = [capacity if factor else len(tokens) * experts.top_k] * experts.count
    out, dropped = [torch.zeros_like(t) for t in tokens], 0
    for choice in range(experts.top_k):
        order = range(len(tokens))
        if experts.drop_policy == "probs":
            order = sorted(order, key=lambda t: -chosen[t, choice])
        for t in order:
            e = int(which[t, choice])
            if room[e] == 0:
                dropped += 1
                continue
            room[e] -= 1
            out[t] = out[t] + weights[t, choice] * expert(layer, e, tokens[t])
    return torch.stack(out), dropped


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6), count=st.sampled_from([2, 4, 7]), k=st.integers(1, 2), normalize=st.booleans(),
    factor=st.sampled_from([0.0, 0.5, 1.0, 2.0]), policy=st.sampled_from(["position", "probs"]), size=st.sampled_from([12, 20]),
    least=st.integers(0, 3), training=st.booleans(),
)  # fmt: skip
def test_experts_equal_the_paper_token_by_token(seed, count, k, normalize, factor, policy, size, least, training):
    other = 0.0 if factor else 1.0
    factors = (factor, other) if training else (other, factor)
    experts = Experts(count, k, size, normalize, 0, (), *factors, min_capacity=least, drop_policy=policy)
    layer = make(experts, seed).train(training)
    x = torch.randn(2, 9, 16, requires_grad=True)
    out, routing = layer(x)
    wanted, dropped = gshard(layer, experts, x.flatten(0, 1), factor)
    assert_equal(out.flatten(0, 1), wanted)
    assert routing.dropped == dropped and routing.load.sum() == 18 * k and routing.first.sum() == 18
    variables = [x, *layer.parameters()]
    direction = torch.randn_like(out)
    for mine, reference in zip(
        torch.autograd.grad(out, variables, direction),
        torch.autograd.grad(wanted.view(out.shape), variables, direction, allow_unused=True, materialize_grads=True),
        strict=True,
    ):
        assert_equal(mine, reference)


def test_router_sums_are_what_they_say():
    layer = make(Experts(4, 2, 8), 0)
    x = torch.randn(1, 30, 16)
    _, routing = layer(x)
    logits = x[0] @ layer.router.weight.T
    probs = logits.softmax(-1)
    torch.testing.assert_close(routing.probs, probs.sum(0))
    torch.testing.assert_close(routing.entropy, torch.distributions.Categorical(probs=probs).entropy().sum())
    torch.testing.assert_close(routing.z, torch.logsumexp(logits, -1).square().sum())
    assert torch.equal(routing.first, torch.bincount(probs.argmax(-1), minlength=4).float())


@settings(max_examples=20, deadline=None)
@given(
    counts=st.lists(st.integers(0, 5), min_size=1, max_size=5),
    extra=st.integers(0, 3),
    sizes=st.sampled_from([(16, 8), (12, 20)]),
)
def test_grouped_products_equal_one_product_per_group(counts, extra, sizes):
    rows, (d, f) = sum(counts) + extra, sizes
    x = torch.randn(rows, d, requires_grad=True)
    weight = torch.randn(len(counts), f, d, requires_grad=True)
    ends = torch.tensor(list(itertools.accumulate(counts)), dtype=torch.int32)
    out = ops.grouped_linear(x, weight, ends, complete=extra == 0)
    parts = [x[b - n : b] @ w.T for n, b, w in zip(counts, ends.tolist(), weight, strict=True)]
    wanted = torch.cat([*parts, torch.zeros(extra, f)])
    direction = torch.randn_like(out)
    torch.testing.assert_close(out, wanted)
    for mine, reference in zip(*(torch.autograd.grad(y, (x, weight), direction) for y in (out, wanted)), strict=True):
        torch.testing.assert_close(mine, reference)


@pytest.mark.parametrize("window", [0, 1, 7, 300])
@pytest.mark.parametrize("alibi", [False, True])
def test_attention_with_windows_and_alibi_equals_the_definition(window, alibi):
    torch.manual_seed(window)
    sizes = [5, 0, 400, 1, 194]  # longer than a block of queries, and not a multiple of anything
    borders = torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32)
    slopes = torch.tensor([0.5, 0.25, 0.1, 0.01]) if alibi else None
    q, k, v = (torch.randn(1, 600, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    out = ops.attention(q, k, v, borders, 512, window=window, slopes_H=slopes)
    wanted = plain_attention(q, k, v, borders.tolist(), window, slopes)
    assert_equal(out, wanted)
    direction = torch.randn_like(out)
    for mine, reference in zip(*(torch.autograd.grad(y, (q, k, v), direction) for y in (out, wanted)), strict=True):
        assert_equal(mine, reference, 1e-4)
    # Whole rows, and the last tokens behind a cache.
    halves = [x.detach().view(2, 300, -1, 8) for x in (q, k, v)]
    rows = ops.attention(*halves, window=window, slopes_H=slopes)
    for row in range(2):
        wanted = plain_attention(*(x[row : row + 1] for x in halves), [0, 300], window, slopes)
        assert (rows[row] - wanted[0]).abs().max() < 1e-5
    last = ops.attention(halves[0][:, -3:], *halves[1:], window=window, slopes_H=slopes)
    assert (last - rows[:, -3:]).abs().max() < 1e-5


def test_a_config_survives_json():
    import json

    config = DecoderConfig("QWEN2MOE", 50, 16, 8, 3, 2, 2, 8, windows=(0, 5, 5), experts=Experts(4, 2, 8, dense_layers=(1,)))
    assert DecoderConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.parameters() == sum(p.numel() for p in Decoder(config).parameters())
