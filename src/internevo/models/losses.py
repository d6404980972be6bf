"""What a model is trained on: cross-entropy, and for mixtures of experts the balance of the load and the router's z-loss.

Auxiliary losses are of one forward pass, over all of its tokens; they enter weighted by the number of its predicted tokens, so
that the sum over a step, divided by all predicted tokens, is the mean. That does not depend on how many ranks share the step.

Shapes: B rows, S tokens, T = B * S, E experts, L layers with experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .moe import Routing


class LossTerms(NamedTuple):
    """Weights of the terms."""

    smoothing: float = 0.0
    """Share of the uniform distribution in the target."""
    balance: float = 0.0
    """Of the load-balancing loss."""
    balance_kind: str = "gshard"
    """gshard: each layer for itself, first choices only, summed over layers (https://arxiv.org/abs/2006.16668, section 2.2).
    pooled: all choices of all layers' tokens as one pool, as Hugging Face's models have it."""
    router_z: float = 0.0
    """Of the router's z-loss, summed over layers (https://arxiv.org/abs/2202.08906, equation 5)."""


class Loss(NamedTuple):
    """The loss of one forward pass."""

    total: Tensor
    """Sum over predicted tokens of all terms: what is differentiated."""
    losses: Tensor
    """Cross-entropy of each token, fp32 [B, S]; 0 where nothing is predicted."""
    routing: list[Routing]
    """Of each layer with experts."""


def pool(routing: Routing) -> Routing:
    """The sums over all tokens of the micro-batch; a strategy that has cut it puts its own function in place of this."""
    return routing


def add_router_losses(cross_entropy: Tensor, labels: Tensor, routing: list[Routing], terms: LossTerms) -> Tensor:
    """The sum of the losses with the routers' terms in it."""
    if not routing or terms.balance == terms.router_z == 0:
        return cross_entropy
    predicted = (labels != -100).sum()
    total = terms.balance * balance(routing, labels.numel(), terms.balance_kind)
    total = total + terms.router_z * torch.stack([r.z for r in routing]).sum() / labels.numel()
    return cross_entropy + predicted * total


def balance(routing: list[Routing], tokens: int, kind: str) -> Tensor:
    """E * sum over experts of (share of tokens) * (mean probability): 1 (for pooled: k) when the load is even."""
    probs_LE = torch.stack([r.probs for r in routing]) / tokens
    experts = probs_LE.shape[1]
    if kind == "gshard":
        first_LE = torch.stack([r.first for r in routing]) / tokens
        return experts * (first_LE * probs_LE).sum()
    load_LE = torch.stack([r.load for r in routing]) / tokens
    return experts * (load_LE.mean(0) * probs_LE.mean(0)).sum()
