"""The loss of training: cross-entropy, and with experts the load-balancing loss and the z-loss of the routers.

Each stage of a pipeline computes the losses of its own routers. The pooled load-balancing loss depends on all routers, so the
last stage computes it: each stage adds the sums of its routers to those of the stages before, and hands them on
(``add_pooled``).

The losses of the routers are computed from all tokens of a micro-batch, and multiplied by the number of its predicted tokens.
Then the sum over all micro-batches of a step, divided by the number of all predicted tokens, is a mean that does not depend on
how many ranks share the step.

Shapes: B rows, S tokens, T = B * S, E experts, L layers with experts.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ..config.training import Loss as LossSection
from .config import DecoderConfig
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

    @classmethod
    def from_config(cls, loss: LossSection) -> LossTerms:
        """Returns the weights that a config's ``loss`` section has."""
        return cls(loss.label_smoothing, loss.moe_loss_coeff, loss.moe_loss_kind, loss.moe_z_loss_coeff)

    def pools(self, config: DecoderConfig) -> bool:
        """Whether there is a load-balancing loss that depends on the routers of all layers of this model together."""
        return self.balance != 0 and self.balance_kind == "pooled" and any(map(config.is_sparse, range(config.num_layers)))


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
    pooled: Tensor | None
    """What the pooled load-balancing loss needs of the layers up to here (``add_pooled``), if there is such a loss."""
    routed: Routed

    def message(self) -> list[Tensor]:
        """Returns what goes to the next stage."""
        return [self.hidden] if self.pooled is None else [self.hidden, self.pooled]


def pool(sums: dict[int, Routing]) -> dict[int, Routing]:
    """Returns the routers' sums over all tokens of the micro-batch. A strategy that shards the tokens replaces this function.

    Args:
        sums: layer -> the sums of its router over the tokens of this rank.
    """
    return sums


def router_losses(
    labels: Tensor, sums: dict[int, Routing], terms: LossTerms, pooled: Tensor | None = None, layers: int = 0
) -> Tensor | None:
    """Returns the losses of the routers, times the number of predicted tokens; None if there are none.

    Args:
        labels: ids to be predicted, or -100.
        sums: layer -> the sums of its router over all tokens of the micro-batch, for the layers of a stage.
        pooled, layers: for the pooled load-balancing loss, in the last stage: ``add_pooled`` of all layers with experts, and
            the number of these layers.
    """
    routing, tokens, losses = list(sums.values()), labels.numel(), list[Tensor]()
    if routing and terms.balance and terms.balance_kind == "gshard":
        losses.append(terms.balance * balance(routing, tokens))
    if pooled is not None:
        losses.append(terms.balance * pooled_balance(pooled, layers * tokens))
    if routing and terms.router_z:
        losses.append(terms.router_z * torch.stack([r.z for r in routing]).sum() / tokens)
    return (labels != -100).sum() * torch.stack(losses).sum() if losses else None


def balance(routing: list[Routing], tokens: int) -> Tensor:
    """Computes GShard's load-balancing loss, summed over layers: E * the sum over experts of (share of the first choices) *
    (mean probability). It is 1 for each layer in which all experts have the same load."""
    probs_LE = torch.stack([r.probs for r in routing]) / tokens
    first_LE = torch.stack([r.first for r in routing]) / tokens
    return probs_LE.shape[1] * (first_LE * probs_LE).sum()


def add_pooled(before: Tensor, routing: Iterable[Routing]) -> Tensor:
    """Returns the loads and the probabilities, each summed over layers with experts [2, E], in fp32.

    Args:
        before: the same of the layers before; zeros if there are none.
    """
    for r in routing:
        before = before + torch.stack([r.load, r.probs])
    return before


def pooled_balance(pooled: Tensor, tokens: int) -> Tensor:
    """Computes the pooled load-balancing loss: E * the sum over experts of (choices per token) * (mean probability). It is k if
    all experts have the same load.

    Args:
        pooled: ``add_pooled`` of all layers.
        tokens: the number of tokens of all layers together.
    """
    load_E, probs_E = pooled / tokens
    return load_E.numel() * (load_E.detach() * probs_E).sum()
