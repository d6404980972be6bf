"""AdamW over sharded parameters, with its state under the parameters' names."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..config.training import Adam

MOMENTS = ("exp_avg", "exp_avg_sq")


class Optimizer:
    """PyTorch's fused AdamW (https://arxiv.org/abs/1711.05101): matrices decay, norms and biases do not.

    Its moments exist from the start, so that a checkpoint is loaded into them in place. All parameters share one step
    count, since a step updates all or none.
    """

    def __init__(self, masters: dict[str, nn.Parameter], config: Adam) -> None:
        self.named = masters
        groups = [
            {"params": [p for p in self.named.values() if p.dim() >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in self.named.values() if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.adam = torch.optim.AdamW(
            [g for g in groups if g["params"]], lr=config.lr, betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_eps, fused=True,
        )  # fmt: skip
        for parameter in self.named.values():
            step = torch.zeros((), dtype=torch.float32, device=_local(parameter).device)
            self.adam.state[parameter] = {"step": step, **{m: torch.zeros_like(parameter) for m in MOMENTS}}

    @property
    def steps(self) -> int:
        """Updates so far."""
        return int(next(iter(self.adam.state.values()))["step"].item())

    @steps.setter
    def steps(self, value: int) -> None:
        for state in self.adam.state.values():
            state["step"].fill_(value)

    def state(self) -> dict[str, Tensor]:
        """The moments by name, ``NAME.exp_avg`` and ``NAME.exp_avg_sq``: DTensors like the parameters."""
        return {f"{name}.{m}": self.adam.state[p][m] for name, p in self.named.items() for m in MOMENTS}

    def gradients(self) -> list[Tensor]:
        """This rank's part of every gradient."""
        return [_local(p.grad) for p in self.named.values() if p.grad is not None]

    def step(self, lr: float, beta2: float) -> None:
        """One update with the gradients as they are."""
        for group in self.adam.param_groups:
            group["lr"] = lr
            group["betas"] = (group["betas"][0], beta2)
        self.adam.step()

    def zero_grad(self) -> None:
        """Frees the gradients."""
        self.adam.zero_grad(set_to_none=True)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
