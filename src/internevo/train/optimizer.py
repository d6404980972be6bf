"""AdamW and Muon for sharded parameters. Their state is named after the parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ..config.training import Adam, Muon
from ..ops import muon
from ..ops.adamw import Rates, Shard, adamw
from ..parallel.shards import local
from ..parallel.teams import Team

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's two moments, by the names that PyTorch gives them."""
MOMENTUM = ("momentum_buffer",)
"""Muon's state."""


class Orthogonal:
    """Muon (``ops.muon``) for the matrices of the layers."""

    def __init__(self, config: Muon, teams: Sequence[Team], dtype: torch.dtype, share: float = 1.0) -> None:
        """
        Args:
            config: ``muon``.
            teams: the ranks that compute together.
            dtype: in which the iterations are computed, and parts sent to other ranks. (fp16 has no room for small numbers.)
            share: of the learning rate that ``step`` gets.
        """
        self.config, self.teams, self.dtype, self.share = config, teams, dtype, share
        self.scales = {name: muon.scale_of(shape, config.scale) for team in teams for name, shape in team.shapes.items()}
        """Name of each weight that Muon updates -> the number by which its learning rate is multiplied."""

    def step(self, shards: Mapping[str, Shard], rates: Rates, factor: Tensor, finite: Tensor) -> None:
        """Updates this rank's shards in place; arguments as for ``adamw``.

        Args:
            shards: name -> shard, whose ``first`` is the momentum.
            rates: ``lr`` and ``decay`` count.
        """
        config, changes, lr = self.config, finite != 0, rates.lr * self.share
        compute = partial(muon.orthogonalized, steps=config.steps)

        def direction(name: str) -> Tensor:
            gradient, momentum = shards[name].gradient, shards[name].first
            return muon.direction(gradient, momentum, config.momentum, config.nesterov, factor, changes).to(self.dtype)

        for team in self.teams:
            for name, update in team.run(direction, compute, factor.new_empty(0, dtype=self.dtype)):
                shard = shards[name]
                muon.apply(shard.master, update, lr * self.scales[name], 1 - lr * rates.decay, changes)
                if shard.weight is not None:
                    shard.weight.copy_(shard.master)
                del update  # which keeps what its wave has gathered


class Optimizer:
    """AdamW (https://arxiv.org/abs/1711.05101), or Muon for some weights. Weight decay applies to matrices, not to norms and
    biases.

    It updates this rank's shard of each parameter as a plain tensor. The moments exist from the start, so that a checkpoint can
    be loaded into them in place. All parameters have the same number of updates, since a step updates all of them or none.
    """

    def __init__(
        self,
        masters: dict[str, nn.Parameter],
        config: Adam,
        model_weights: Mapping[str, Tensor] | None = None,
        orthogonal: Orthogonal | None = None,
    ) -> None:
        """
        Args:
            masters: name -> master weight, for all weights. Those that do not require a gradient are never updated.
            config: ``adam``.
            model_weights: name -> the model's weight, of the masters that are other tensors. They are updated, too.
            orthogonal: Muon. None: AdamW updates all weights.
        """
        self.orthogonal, self.by_muon = orthogonal, orthogonal.scales.keys() if orthogonal is not None else ()
        self.named, self.config, self.model_weights = masters, config, model_weights or {}
        trained = {name: p for name, p in masters.items() if p.requires_grad}
        kinds = {name: MOMENTUM if name in self.by_muon else MOMENTS for name in trained}
        self.moments = {
            name: {kind: torch.zeros_like(p, requires_grad=False) for kind in kinds[name]} for name, p in trained.items()
        }
        self.one = torch.ones((), device=local(next(iter(masters.values()))).device)
        self.steps = 0
        """The number of updates so far."""

    def state(self) -> dict[str, Tensor]:
        """Returns the moments, which are DTensors like their parameters, as ``NAME.exp_avg``, ``NAME.exp_avg_sq`` and
        ``NAME.momentum_buffer``."""
        return {f"{name}.{kind}": tensor for name, moments in self.moments.items() for kind, tensor in moments.items()}

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        """Returns the weights (model/NAME) and moments (optimizer/NAME.exp_avg, ...) under their names in a checkpoint."""
        weights = {f"model/{name}": tensor.detach() for name, tensor in self.named.items()}
        return {**weights, **{f"optimizer/{name}": tensor for name, tensor in self.state().items()}}

    def gradients(self) -> dict[str, Tensor]:
        """Returns this rank's shard of every gradient."""
        return {name: local(p.grad) for name, p in self.named.items() if p.grad is not None}

    @torch.no_grad()
    def step(self, lr: float, beta2: float, factor: Tensor | None = None, finite: Tensor | None = None) -> None:
        """Updates all parameters that have a gradient. Afterwards the values of the gradients are undefined.

        Args:
            factor: the number by which the gradients are multiplied first; a scalar in fp32 on the device. None: 1.
            finite: 1, or 0 to update nothing; a scalar in fp32 on the device. ``skipped`` must be called after a 0.
        """
        self.steps += 1
        shards, config = {name: self._shard(name, grad) for name, grad in self.gradients().items()}, self.config
        factor, finite = self.one if factor is None else factor, self.one if finite is None else finite
        rates = Rates(lr, config.adam_beta1, beta2, config.adam_eps, config.weight_decay, self.steps)
        for decays in (True, False):
            its = [s for name, s in shards.items() if (self.named[name].dim() >= 2) == decays and name not in self.by_muon]
            if its:
                adamw(its, rates if decays else rates._replace(decay=0.0), factor, finite)
        if self.orthogonal is not None:
            self.orthogonal.step(shards, rates, factor, finite)

    def skipped(self) -> None:
        """Must be called if the last step has updated nothing. (This is only known later, when the device is that far.)"""
        self.steps -= 1

    def _shard(self, name: str, gradient: Tensor) -> Shard:
        first, *second = (local(moment) for moment in self.moments[name].values())
        return Shard(local(self.named[name]), gradient, first, second[0] if second else first, self.model_weights.get(name))

    def zero_grad(self) -> None:
        """Frees the gradients."""
        for parameter in self.named.values():
            parameter.grad = None
