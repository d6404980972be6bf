"""The loss of training: cross-entropy, and with experts the load-balancing loss and the z-loss of the routers.

The losses of the routers are computed from all tokens of a micro-batch, and multiplied by the number of its predicted tokens.
Then the sum over all micro-batches of a step, divided by the number of all predicted tokens, is a mean that does not depend on
how many ranks share the step.

Shapes: B rows, S tokens, T = B * S, E experts, L layers with experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .moe import Routing


class LossTerms(NamedTuple):
    """The weights of the terms of the loss."""

    smoothing: float = 0.0
    """Label smoothing: the weight of the uniform distribution in the target."""
    balance: float = 0.0
    """The weight of the load-balancing loss."""
    balance_kind: str = "gshard"
    """gshard: for each layer, from first choices only, and summed over layers (https://arxiv.org/abs/2006.16668, section 2.2).
    pooled: once, from all choices in all layers, as in Hugging Face's models."""
    router_z: float = 0.0
    """The weight of the routers' z-loss, which is summed over layers (https://arxiv.org/abs/2202.08906, equation 5)."""


class Routed(NamedTuple):
    """What the routers of the layers of a model, or of one stage of it, have done in one forward pass."""

    sums: dict[int, Routing]
    """Layer -> the sums of its router, for the layers with experts."""
    loss: Tensor | None
    """The losses of these routers, times the number of predicted tokens. Differentiable. None: there are none."""


class Loss(NamedTuple):
    """The loss of one forward pass."""

    total: Tensor
    """The sum of all terms over the predicted tokens. It is differentiable."""
    losses: Tensor
    """The cross-entropy of each token, fp32 [B, S]; 0 where nothing is predicted."""
    routed: Routed


class HandedOn(NamedTuple):
    """The result of a stage without a head."""

    hidden: Tensor
    """The residual stream [B, S, D], which the next stage needs."""
    routed: Routed


def pool(sums: dict[int, Routing]) -> dict[int, Routing]:
    """Returns the routers' sums over all tokens of the micro-batch. A strategy that shards the tokens replaces this function.

    Args:
        sums: layer -> the sums of its router over the tokens of this rank.
    """
    return sums


def router_losses(labels: Tensor, sums: dict[int, Routing], terms: LossTerms) -> Tensor | None:
    """Returns the losses of the routers, times the number of predicted tokens; None if there are none.

    Args:
        labels: ids to be predicted, or -100.
        sums: layer -> the sums of its router over all tokens of the micro-batch.
    """
    if not sums or terms.balance == terms.router_z == 0:
        return None
    routing, predicted = list(sums.values()), (labels != -100).sum()
    total = terms.balance * balance(routing, labels.numel(), terms.balance_kind)
    total = total + terms.router_z * torch.stack([r.z for r in routing]).sum() / labels.numel()
    return predicted * total


def balance(routing: list[Routing], tokens: int, kind: str) -> Tensor:
    """Computes the load-balancing loss: E * the sum over experts of (share of the tokens) * (mean probability).

    It is 1 (pooled: k) if all experts have the same load.
    """
    probs_LE = torch.stack([r.probs for r in routing]) / tokens
    experts = probs_LE.shape[1]
    if kind == "gshard":
        first_LE = torch.stack([r.first for r in routing]) / tokens
        return experts * (first_LE * probs_LE).sum()
    load_LE = torch.stack([r.load for r in routing]) / tokens
    return experts * (load_LE.mean(0) * probs_LE.mean(0)).sum()
