"""AdamW for sharded parameters. Its state is named after the parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from ..config.training import Adam
from ..ops import foreach
from ..parallel.shards import local

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Adam's two moments, by the names that PyTorch gives them."""


class Optimizer:
    """PyTorch's fused AdamW (https://arxiv.org/abs/1711.05101). Weight decay applies to matrices, not to norms and biases.

    It updates this rank's shard of each parameter as a plain tensor. The moments exist from the start, so that a checkpoint can
    be loaded into them in place. All parameters have the same number of updates, since a step updates all of them or none.
    """

    def __init__(self, masters: dict[str, nn.Parameter], config: Adam) -> None:
        """
        Args:
            masters: name -> master weight, for all weights. Those that do not require a gradient are never updated.
            config: ``adam``.
        """
        self.named, self.config = masters, config
        trained = {name: p for name, p in masters.items() if p.requires_grad}
        self.moments = {name: [torch.zeros_like(p, requires_grad=False) for _ in MOMENTS] for name, p in trained.items()}
        device = local(next(iter(masters.values()))).device
        self._steps = {name: torch.zeros((), dtype=torch.float32, device=device) for name in trained}

    @property
    def steps(self) -> int:
        """The number of updates so far."""
        return int(next(iter(self._steps.values())).item())

    @steps.setter
    def steps(self, value: int) -> None:
        for step in self._steps.values():
            step.fill_(value)

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
    def step(self, lr: float, beta2: float) -> None:
        """Updates all parameters that have a gradient."""
        gradients = self.gradients()
        for decays in (True, False):
            names = [name for name in gradients if (self.named[name].dim() >= 2) == decays]
            if names:
                first, second = ([local(self.moments[name][m]) for name in names] for m in range(2))
                adamw(
                    [local(self.named[name]) for name in names], [gradients[name] for name in names], first, second, [],
                    [self._steps[name] for name in names],
                    fused=True, amsgrad=False, beta1=self.config.adam_beta1, beta2=beta2, lr=lr,
                    weight_decay=self.config.weight_decay if decays else 0.0, eps=self.config.adam_eps, maximize=False,
                )  # fmt: skip

    @torch.no_grad()
    def scale_gradients(self, factor: float) -> None:
        """Multiplies every gradient by ``factor``, in place."""
        foreach.scale(list(self.gradients().values()), factor)

    def zero_grad(self) -> None:
        """Frees the gradients."""
        for parameter in self.named.values():
            parameter.grad = None
