"""AdamW for sharded parameters. Its state is named after the parameters."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..config.training import Adam
from ..ops.adamw import Rates, Shard, adamw
from ..parallel.shards import local

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's two moments, by the names that PyTorch gives them."""


class Optimizer:
    """AdamW (https://arxiv.org/abs/1711.05101). Weight decay applies to matrices, not to norms and biases.

    It updates this rank's shard of each parameter as a plain tensor. The moments exist from the start, so that a checkpoint can
    be loaded into them in place. All parameters have the same number of updates, since a step updates all of them or none.
    """

    def __init__(
        self, masters: dict[str, nn.Parameter], config: Adam, model_weights: Mapping[str, Tensor] | None = None
    ) -> None:
        """
        Args:
            masters: name -> master weight, for all weights. Those that do not require a gradient are never updated.
            config: ``adam``.
            model_weights: name -> the model's weight, of the masters that are other tensors. They are updated, too.
        """
        self.named, self.config, self.model_weights = masters, config, model_weights or {}
        trained = {name: p for name, p in masters.items() if p.requires_grad}
        self.moments = {name: [torch.zeros_like(p, requires_grad=False) for _ in MOMENTS] for name, p in trained.items()}
        self.one = torch.ones((), device=local(next(iter(masters.values()))).device)
        self.steps = 0
        """The number of updates so far."""

    def state(self) -> dict[str, Tensor]:
        """Returns the moments, which are DTensors like their parameters, as ``NAME.exp_avg`` and ``NAME.exp_avg_sq``."""
        return {f"{name}.{m}": t for name, both in self.moments.items() for m, t in zip(MOMENTS, both, strict=True)}

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
        gradients, config = self.gradients(), self.config
        for decays in (True, False):
            shards = [self._shard(name, grad) for name, grad in gradients.items() if (self.named[name].dim() >= 2) == decays]
            if shards:
                decay = config.weight_decay if decays else 0.0
                rates = Rates(lr, config.adam_beta1, beta2, config.adam_eps, decay, self.steps)
                adamw(shards, rates, self.one if factor is None else factor, self.one if finite is None else finite)

    def skipped(self) -> None:
        """Must be called if the last step has updated nothing. (This is only known later, when the device is that far.)"""
        self.steps -= 1

    def _shard(self, name: str, gradient: Tensor) -> Shard:
        first, second = (local(moment) for moment in self.moments[name])
        return Shard(local(self.named[name]), gradient, first, second, self.model_weights.get(name))

    def zero_grad(self) -> None:
        """Frees the gradients."""
        for parameter in self.named.values():
            parameter.grad = None
