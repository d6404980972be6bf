"""Compares experts with a capacity with loops over tokens."""

import math

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from internevo.models.config import DecoderConfig, Experts
from internevo.models.decoder import Decoder
from internevo.models.moe import MoE
from tests.references import assert_close_to_scale


def tiny(experts: Experts) -> DecoderConfig:
    return DecoderConfig("MIXTRALMOE", 50, 16, experts.size, 1, 2, 2, 8, experts=experts)


def make(experts: Experts, seed: int) -> MoE:
    torch.manual_seed(seed)
    layer = MoE(tiny(experts), experts, None, None)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return layer


def expert(layer: MoE, number: int, x: Tensor) -> Tensor:
    """Applies one expert of a layer to one token."""
    gate, up, down = (getattr(layer.experts, part).weight[number] for part in ("gate", "up", "down"))
    return down @ (F.silu(gate @ x) * (up @ x))


def gshard(layer: MoE, experts: Experts, tokens: Tensor, factor: float) -> tuple[Tensor, int]:
    """The algorithm of the paper, one token after the other: all first choices come before all second ones, and a full expert
    takes no more tokens. Returns the output and the number of dropped choices."""
    probs = (tokens @ layer.router.weight.T).softmax(-1)
    chosen, which = probs.topk(experts.top_k)
    weights = chosen / chosen.sum(1, keepdim=True) if experts.normalize else chosen
    capacity = max(experts.min_capacity, math.ceil(len(tokens) * experts.top_k / experts.count * factor))
    room = [capacity if factor else len(tokens) * experts.top_k] * experts.count
    out, dropped = [torch.zeros_like(t) for t in tokens], 0
    for choice in range(experts.top_k):
        order = list(range(len(tokens)))
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
def test_experts_equal_the_paper_token_by_token(
    seed: int, count: int, k: int, normalize: bool, factor: float, policy: str, size: int, least: int, training: bool
) -> None:
    other = 0.0 if factor else 1.0
    factors = (factor, other) if training else (other, factor)
    experts = Experts(count, k, size, normalize, 0, (), *factors, min_capacity=least, drop_policy=policy)
    layer = make(experts, seed).train(training)
    x = torch.randn(2, 9, 16, requires_grad=True)
    out, routing = layer(x)
    wanted, dropped = gshard(layer, experts, x.flatten(0, 1), factor)
    assert_close_to_scale(out.flatten(0, 1), wanted)
    assert routing.dropped == dropped and routing.load.sum() == 18 * k and routing.first.sum() == 18
    variables = [x, *layer.parameters()]
    direction = torch.randn_like(out)
    for mine, reference in zip(
        torch.autograd.grad(out, variables, direction),
        torch.autograd.grad(wanted.view(out.shape), variables, direction, allow_unused=True, materialize_grads=True),
        strict=True,
    ):
        assert_close_to_scale(mine, reference)


def test_sums_of_the_router_equal_their_definitions() -> None:
    layer = make(Experts(4, 2, 8), 0)
    x = torch.randn(1, 30, 16)
    _, routing = layer(x)
    logits = x[0] @ layer.router.weight.T
    probs = logits.softmax(-1)
    torch.testing.assert_close(routing.probs, probs.sum(0))
    torch.testing.assert_close(routing.entropy, torch.distributions.Categorical(probs=probs).entropy().sum())
    torch.testing.assert_close(routing.z, torch.logsumexp(logits, -1).square().sum())
    assert torch.equal(routing.first, torch.bincount(probs.argmax(-1), minlength=4).float())


def test_a_decoder_config_is_the_same_after_json() -> None:
    import json

    config = DecoderConfig("QWEN2MOE", 50, 16, 8, 3, 2, 2, 8, windows=(0, 5, 5), experts=Experts(4, 2, 8, dense_layers=(1,)))
    assert DecoderConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.parameters() == sum(p.numel() for p in Decoder(config).parameters())
