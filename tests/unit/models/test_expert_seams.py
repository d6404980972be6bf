"""The functions of experts that a strategy replaces: two ranks with half of the tokens each equal one with all of them."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from internevo.models.config import DecoderConfig, Experts
from internevo.models.losses import balance
from internevo.models.moe import ExpertMLPs, MoE, Routing
from internevo.parallel.collectives import all_gather, reduce
from internevo.parallel.world import World
from tests.pool import Pool


def make(policy: str, capacity: float) -> tuple[MoE, Tensor]:
    torch.manual_seed(0)
    experts = Experts(4, 2, 12, capacity_factor=capacity, eval_capacity_factor=capacity, min_capacity=1, drop_policy=policy)
    config = DecoderConfig("QWEN3MOE", 97, 16, 24, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8, experts=experts)
    moe = MoE(config, experts, None, None)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return moe, torch.randn(1, 20, 16)


def backward(out: Tensor, routing: Routing) -> Tensor:
    """Returns a loss that depends on the output and on the load-balancing loss, both for all tokens."""
    return out.square().sum() + 7.0 * balance([routing], 20, "gshard") + 3.0 * balance([routing], 20, "pooled")


def _half(world: World, policy: str, capacity: float) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    group = dist.group.WORLD
    assert group is not None
    moe, x = make(policy, capacity)
    mine = slice(world.rank * 10, world.rank * 10 + 10)
    calls: list[int] = []

    def run_experts(
        experts: ExpertMLPs, rows_RD: Tensor, ends_E: Tensor, complete: bool, meanwhile: Callable[[], Tensor | None]
    ) -> tuple[Tensor, Tensor | None]:
        calls.append(rows_RD.shape[0])
        return experts(rows_RD, ends_E, complete), meanwhile()

    def gather(values_1Sk: Tensor) -> Tensor:
        return all_gather(values_1Sk.transpose(0, 1), group).transpose(0, 1)

    moe.router.all_tokens = lambda probs_BSk, experts_BSk: (gather(probs_BSk), gather(experts_BSk))
    moe.router.own_tokens = lambda values_BSk: values_BSk[:, mine]
    moe.run_experts = run_experts
    out, routing = moe(x[:, mine])
    pooled = Routing(*(reduce(value, group) for value in routing))
    # The gradients of each rank come from its own tokens only, although every rank computes the full load-balancing loss.
    (out.square().sum() + backward(out.detach() * 0, pooled)).backward()
    assert calls == [20]
    gradients = [p.grad for p in moe.parameters() if p.grad is not None]
    for gradient in gradients:
        dist.all_reduce(gradient)
    return out.detach(), [value.detach() for value in pooled], gradients


@pytest.mark.parametrize(("policy", "capacity"), [("position", 0.0), ("position", 0.7), ("probs", 0.7)])
def test_ranks_with_half_of_the_tokens_equal_one_with_all(pool: Pool, policy: str, capacity: float) -> None:
    moe, x = make(policy, capacity)
    out, routing = moe(x)
    backward(out, routing).backward()
    wanted = [p.grad for p in moe.parameters() if p.grad is not None]
    halves = pool.run(_half, 2, policy, capacity)
    torch.testing.assert_close(torch.cat([half[0] for half in halves], dim=1), out.detach())
    for _, pooled, gradients in halves:
        assert pooled[0].equal(routing.load) and pooled[1].equal(routing.first), "the counts are exact"
        assert pooled[5].equal(routing.dropped) and (capacity == 0) == (routing.dropped == 0)
        for value, whole in zip(pooled, routing, strict=True):
            torch.testing.assert_close(value, whole.detach())
        for gradient, whole in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(gradient, whole, rtol=1e-5, atol=1e-6 * float(whole.abs().max()))
