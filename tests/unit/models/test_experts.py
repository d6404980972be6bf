"""Compares experts with a capacity with loops over tokens."""

import math

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from internevo.models.config import DecoderConfig, Experts
from internevo.models.decoder import Decoder
from internevo.models.moe import MoE, Router
from tests.references import assert_close_to_scale


def tiny(experts: Experts) -> DecoderConfig:
    return DecoderConfig("MIXTRALMOE", 50, 16, experts.size, 1, 2, 2, 8, experts=experts)


def make(experts: Experts, seed: int) -> MoE:
    torch.manual_seed(seed)
    layer = MoE(tiny(experts), experts, None, None)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
        if layer.router.bias is not None:
            layer.router.bias.copy_(torch.randn(experts.count) * 0.1)
    return layer


def expert(layer: MoE, number: int, x: Tensor) -> Tensor:
    """Applies one expert of a layer to one token."""
    gate, up, down = (getattr(layer.experts, part).weight[number] for part in ("gate", "up", "down"))
    return down @ (F.silu(gate @ x) * (up @ x))


def gshard(layer: MoE, experts: Experts, tokens: Tensor, factor: float) -> tuple[Tensor, int]:
    """The algorithm of the paper, one token after the other: all first choices come before all second ones, and a full expert
    takes no more tokens. Returns the output and the number of dropped choices."""
    probs = (tokens @ layer.router.weight.T).softmax(-1)
    which = (probs if layer.router.bias is None else probs + layer.router.bias).topk(experts.top_k).indices
    chosen = probs.gather(1, which)
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
    least=st.integers(0, 3), training=st.booleans(), bias=st.booleans(),
)  # fmt: skip
def test_experts_equal_the_paper_token_by_token(
    seed: int,
    count: int,
    k: int,
    normalize: bool,
    factor: float,
    policy: str,
    size: int,
    least: int,
    training: bool,
    bias: bool,
) -> None:
    other = 0.0 if factor else 1.0
    factors = (factor, other) if training else (other, factor)
    experts = Experts(count, k, size, normalize, 0, (), *factors, min_capacity=least, drop_policy=policy, balance_bias=bias)
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


def biased(bias: Tensor) -> Router:
    experts = Experts(len(bias), 2, 8, balance_bias=True)
    router = Router(tiny(experts), experts)
    torch.nn.init.normal_(router.weight, std=0.3)
    router.bias = bias
    return router


def test_a_bias_moves_by_the_sign_of_the_load_error_of_exact_counts() -> None:
    """The paper's algorithm 1. The mean load of three experts is not exact in floating point."""
    router = biased(torch.tensor([0.5, -0.25, 0.0]))
    for load in ([7, 7, 7], [10**15 + 1, 10**15, 10**15 - 1]):
        router.balance(torch.tensor(load, dtype=torch.float64), 0.125)
    assert router.bias is not None and router.bias.tolist() == [0.375, -0.25, 0.125]


def test_biases_make_the_load_of_skewed_tokens_even() -> None:
    torch.manual_seed(0)
    router = biased(torch.zeros(8))
    x = torch.randn(1, 512, 16) + router.weight[0].detach()  # most tokens are close to expert 0
    before = router(x)[3].load
    for _ in range(400):
        router.balance(router(x)[3].load.double(), 0.001)
    load = router(x)[3].load
    assert before.max() > 2 * before.mean() and load.max() < 1.1 * load.mean() and load.min() > 0.9 * load.mean()


def test_a_bias_stays_in_fp32_and_starts_at_zero() -> None:
    with torch.device("meta"):
        model = Decoder(tiny(Experts(4, 2, 8, balance_bias=True)))
    model.to(torch.bfloat16).materialize("cpu")
    name = "layers.0.mlp.router.bias"
    assert model.stored()[name].equal(torch.zeros(4)) and name not in dict(model.named_parameters())
    values = torch.tensor([0.001, 1 / 3, -0.7, 1e-9])
    model.stored()[name].copy_(values)
    for move in (Decoder.half, Decoder.bfloat16, Decoder.double, Decoder.cpu):
        assert move(model).stored()[name].equal(values)


def test_a_decoder_config_is_the_same_after_json() -> None:
    import json

    config = DecoderConfig("QWEN2MOE", 50, 16, 8, 3, 2, 2, 8, windows=(0, 5, 5), experts=Experts(4, 2, 8, dense_layers=(1,)))
    assert DecoderConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.parameters() == sum(p.numel() for p in Decoder(config).parameters())
