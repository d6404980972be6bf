"""Mixture of experts: a router chooses ``k`` of ``E`` experts for each token (https://arxiv.org/abs/2006.16668).

Tokens are sorted by expert, and the rows of each expert go through it as one group. An expert takes all tokens that choose it
(dropless), or only as many as its capacity; the others are dropped, which means that its part of their output is zero.

Shapes: T tokens, D hidden, E experts, k choices per token, F width of an expert.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from .config import DecoderConfig, Experts
from .linear import local_part


class Routing(NamedTuple):
    """Sums over the tokens in the router of one layer, in fp32, for losses and metrics. ``probs`` and ``z`` have gradients."""

    load: Tensor
    """How many times each expert was chosen [E], before choices are dropped."""
    first: Tensor
    """How many times each expert was the first choice [E]."""
    probs: Tensor
    """The sum of the probabilities of each expert [E]."""
    z: Tensor
    """The sum of the squared log-sum-exp of the logits."""
    entropy: Tensor
    """The sum of the entropy of the probabilities, in nats."""
    dropped: Tensor
    """How many choices were dropped."""


# The functions that a strategy may replace, because ranks have different tokens of a micro-batch, or different experts. -----


def enter(x_BSD: Tensor) -> Tensor:
    """Makes the input of the router and the experts from that of the layer."""
    return x_BSD


def leave(x_BSD: Tensor) -> Tensor:
    """Makes the output of the layer from that of the experts."""
    return x_BSD


def all_tokens(probs_BSk: Tensor, experts_BSk: Tensor) -> tuple[Tensor, Tensor]:
    """Gathers the choices of this rank's tokens into those of the whole micro-batch, in its order, without gradients."""
    return probs_BSk, experts_BSk


def own_tokens(values_BSk: Tensor) -> Tensor:
    """Selects this rank's tokens from values of the whole micro-batch: the inverse of ``all_tokens``."""
    return values_BSk


def run_experts(
    experts: ExpertMLPs, rows_RD: Tensor, ends_E: Tensor, complete: bool, meanwhile: Callable[[], Tensor | None]
) -> tuple[Tensor, Tensor | None]:
    """Sends rows, which are sorted by expert, through their experts. Arguments as for ``ops.grouped_linear``.

    Args:
        meanwhile: something to compute while rows travel.

    Returns:
        The rows of the experts' output [R, D], and what ``meanwhile`` returned.
    """
    return experts(rows_RD, ends_E, complete), meanwhile()


def mlps(experts: ExpertMLPs, rows_RD: Tensor, ends_E: Tensor, complete: bool) -> Tensor:
    """Applies each expert to its rows [R, D]. Arguments as for ``ops.grouped_linear``."""
    gate, up = experts.gate(rows_RD, ends_E, complete), experts.up(rows_RD, ends_E, complete)
    return experts.down(ops.gated(gate, up, experts.activation), ends_E, complete)


# ---------------------------------------------------------------------------------------------------------------------------


class Router(nn.Module):
    """Chooses the experts of each token and their weights. It computes in fp32.

    With a balance bias (https://arxiv.org/abs/2408.15664), it chooses the experts with the largest score + bias; their
    weights do not depend on the bias, and no gradient flows into it. Training moves it (``balance``).
    """

    bias: Tensor | None
    """The balance bias [E], in fp32."""

    def __init__(self, config: DecoderConfig, experts: Experts) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts.count, config.hidden_size))
        self.axes = ("expert", "embed")
        self.experts = experts
        self.register_buffer("bias", torch.zeros(experts.count, dtype=torch.float32) if experts.balance_bias else None)
        self.all_tokens, self.own_tokens = all_tokens, own_tokens

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor, Routing]:
        """
        Returns:
            The experts of each token (int64 [T, k]), their weights (fp32 [T, k]), whether each choice is kept and not dropped
            (bool [T, k]), and the sums over the tokens.
        """
        logits_TE = F.linear(x_BSD.flatten(0, 1).float(), self.weight.float())
        scores_TE = logits_TE.sigmoid() if self.experts.scoring == "sigmoid" else logits_TE.softmax(-1)
        probs_TE = scores_TE / scores_TE.sum(-1, keepdim=True) if self.experts.scoring == "sigmoid" else scores_TE
        experts_Tk = self.choose(scores_TE)
        chosen_Tk = scores_TE.gather(1, experts_Tk)
        weights_Tk = chosen_Tk / chosen_Tk.sum(-1, keepdim=True) if self.experts.normalize else chosen_Tk
        weights_Tk = weights_Tk if self.experts.scale == 1.0 else weights_Tk * self.experts.scale
        kept_Tk = self._kept(*(choices.unflatten(0, x_BSD.shape[:2]) for choices in (chosen_Tk.detach(), experts_Tk)))
        log_probs = logits_TE.detach().log_softmax(-1)
        routing = Routing(
            load=self._counts(experts_Tk),
            first=self._counts(experts_Tk[:, 0]),
            probs=probs_TE.sum(0),
            z=logits_TE.logsumexp(-1).square().sum(),
            entropy=-(log_probs.exp() * log_probs).sum(),
            dropped=(~kept_Tk).sum().float(),
        )
        return experts_Tk, weights_Tk, kept_Tk, routing

    def choose(self, scores_TE: Tensor) -> Tensor:
        """Returns the experts of each token [T, k]."""
        e, scores_TE = self.experts, scores_TE.detach()
        scores_TE = scores_TE if self.bias is None else scores_TE + self.bias
        if e.groups > 1:
            by_group_TGN = scores_TE.unflatten(1, (e.groups, -1))
            group_TG = by_group_TGN.topk(2).values.sum(-1) if e.scoring == "sigmoid" else by_group_TGN.amax(-1)
            closed_TG = torch.ones_like(group_TG, dtype=torch.bool).scatter(1, group_TG.topk(e.top_groups).indices, False)
            scores_TE = by_group_TGN.masked_fill(closed_TG.unsqueeze(-1), -torch.inf).flatten(1)
        return scores_TE.topk(e.top_k).indices

    @torch.no_grad()
    def balance(self, load: Tensor, speed: float | Tensor) -> None:
        """Moves the bias of each expert by ``speed``: up if its load is less than the mean, and down if it is more.

        Args:
            load: how many times each expert was chosen in a step, by the tokens of all ranks [E], in fp64 on the device.
        """
        assert self.bias is not None
        # The counts are multiplied, and not divided, so that the comparison with the mean is exact.
        self.bias += (speed * (load.sum() - self.experts.count * load).sign()).float()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """Applies what ``module.to(...)`` and the like do to tensors. The bias goes to another device, but stays in fp32: such
        functions do not convert integers. It is 0 when it leaves the meta device."""
        bias, self.bias = self.bias, None
        super()._apply(fn, recurse)
        if bias is not None:
            moved = fn(bias.view(torch.int32)).view(torch.float32)
            self.bias = torch.zeros_like(moved) if bias.is_meta else moved
        return self

    def _counts(self, experts: Tensor) -> Tensor:
        """Returns how often each expert is among ``experts`` [E]. (One-hot vectors would take E times the memory.)"""
        chosen = experts.flatten()
        ones = torch.ones_like(chosen, dtype=torch.float32)
        return torch.zeros(self.experts.count, device=chosen.device).scatter_add(0, chosen, ones)

    def _kept(self, probs_BSk: Tensor, experts_BSk: Tensor) -> Tensor:
        """Returns which choices of this rank's tokens are kept [T, k]: each expert keeps as many as its capacity. First choices
        come before second ones; the drop policy decides between equal ones."""
        e = self.experts
        factor = e.capacity_factor if self.training else e.eval_capacity_factor
        if factor == 0:
            return torch.ones_like(experts_BSk, dtype=torch.bool).flatten(0, 1)
        probs_BSk, experts_BSk = self.all_tokens(probs_BSk, experts_BSk)
        probs_Tk, experts_Tk = probs_BSk.flatten(0, 1), experts_BSk.flatten(0, 1)
        tokens, k = experts_Tk.shape
        capacity = max(e.min_capacity, math.ceil(tokens * k / e.count * factor))
        # Choices in the order in which experts take them: all first choices, then all second ones, and so on.
        if e.drop_policy == "probs":
            order_kT = probs_Tk.t().argsort(dim=1, descending=True, stable=True)
        else:
            order_kT = torch.arange(tokens, device=probs_Tk.device).expand(k, tokens)
        wanted = experts_Tk.t().gather(1, order_kT).flatten()
        # The number of each choice, from 0, among those of the same expert.
        by_expert = wanted.argsort(stable=True)
        first = torch.searchsorted(wanted[by_expert], wanted[by_expert])
        fits = torch.arange(len(wanted), device=wanted.device) - first < capacity
        fits_kT = torch.zeros_like(fits).scatter(0, by_expert, fits).view(k, tokens)
        kept_Tk = torch.zeros_like(fits_kT).scatter(1, order_kT, fits_kT).t()
        # As a view, it would keep the choices of all tokens until the backward pass.
        return self.own_tokens(kept_Tk.unflatten(0, experts_BSk.shape[:2])).flatten(0, 1).contiguous()


class ExpertMLPs(nn.Module):
    """E gated MLPs, each of which is applied to its own rows."""

    def __init__(self, config: DecoderConfig, experts: Experts) -> None:
        super().__init__()
        shape = (experts.count, experts.size, config.hidden_size)
        self.gate = ExpertLinear("mlp", "embed", *shape)
        self.up = ExpertLinear("mlp", "embed", *shape)
        self.down = ExpertLinear("embed", "mlp", experts.count, config.hidden_size, experts.size)
        self.activation = config.activation
        self.mlps = mlps

    def forward(self, rows_RD: Tensor, ends_E: Tensor, complete: bool) -> Tensor:
        """Applies each expert to its rows. Arguments as for ``ops.grouped_linear``."""
        return self.mlps(self, rows_RD, ends_E, complete)


class ExpertLinear(nn.Module):
    """One linear per expert. Their weights [out, in] are one parameter [E, out, in]."""

    def __init__(self, out_axis: str, in_axis: str, count: int, out_size: int, in_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, out_size, in_size))
        self.axes = ("expert", out_axis, in_axis)
        self.local_part: Callable[[Tensor], Tensor] = local_part
        self.product: Callable[[Tensor, Tensor, Tensor, bool], Tensor] = ops.grouped_linear
        """Multiplies rows by the weights (or this rank's part of them). A schedule may replace it."""

    def forward(self, rows_RD: Tensor, ends_E: Tensor, complete: bool) -> Tensor:
        return self.product(rows_RD, self.local_part(self.weight), ends_E, complete)


class MoE(nn.Module):
    """The weighted sum of the outputs of a token's experts, plus that of the shared expert, if there is one."""

    def __init__(
        self, config: DecoderConfig, experts: Experts, shared: nn.Module | None, shared_gate: nn.Module | None
    ) -> None:
        """
        Args:
            shared: the shared expert, an MLP that sees every token.
            shared_gate: the linear [1, D] whose sigmoid is the weight of the shared expert. None: the weight is 1.
        """
        super().__init__()
        self.top_k, self.dropless = experts.top_k, experts.capacity_factor == experts.eval_capacity_factor == 0
        self.router = Router(config, experts)
        self.experts = ExpertMLPs(config, experts)
        self.shared, self.shared_gate = shared, shared_gate
        self.enter, self.leave, self.run_experts = enter, leave, run_experts
        self.routed = self.run_routed
        """Computes the weighted sum of the experts' outputs. A strategy may replace it."""

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, Routing]:
        x_BSD = self.enter(x_BSD)
        out_BSD, shared_BSD, routing = self.routed(x_BSD, partial(self._run_shared, x_BSD))
        return self.leave(out_BSD if shared_BSD is None else out_BSD + shared_BSD), routing

    def run_routed(self, x_BSD: Tensor, meanwhile: Callable[[], Tensor | None]) -> tuple[Tensor, Tensor | None, Routing]:
        """Returns the weighted sum of the experts' outputs, what ``meanwhile`` returned, and the sums of the router."""
        x_TD = x_BSD.flatten(0, 1)
        experts_Tk, weights_Tk, kept_Tk, routing = self.router(x_BSD)
        # Rows that no expert takes are sorted to the end, as if they had chosen one more expert after the last.
        count = routing.load.shape[0]
        targets_R = torch.where(kept_Tk, experts_Tk, count).flatten()
        order_R = targets_R.argsort(stable=True)
        inverse_R = ops.inverse(order_R)
        ends_E = torch.searchsorted(targets_R[order_R], torch.arange(count, device=x_TD.device), right=True).int()
        rows_RD = ops.take_rows(x_TD, order_R // self.top_k, inverse_R, copies=self.top_k)
        out_RD, other = self.run_experts(self.experts, rows_RD, ends_E, self.dropless, meanwhile)
        out_TkD = ops.take_rows(out_RD, inverse_R, order_R).view(*experts_Tk.shape, -1)
        weights_T1k = (weights_Tk * kept_Tk).to(x_TD.dtype).unsqueeze(1)
        out_TD = torch.bmm(weights_T1k, out_TkD).squeeze(1)
        return out_TD.view(x_BSD.shape), other, routing

    def _run_shared(self, x_BSD: Tensor) -> Tensor | None:
        if self.shared is None:
            return None
        out_BSD: Tensor = self.shared(x_BSD)
        return out_BSD if self.shared_gate is None else torch.sigmoid(self.shared_gate(x_BSD)) * out_BSD
