"""What the routers of a mixture of experts did in a step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..models.config import DecoderConfig
from ..models.losses import Loss


class RouterSums:
    """Sums over the tokens of a step, as one vector that is added up over ranks with everything else."""

    def __init__(self, config: DecoderConfig, device: torch.device) -> None:
        self.layers = sum(config.is_sparse(layer) for layer in range(config.num_layers))
        self.experts = config.experts.count if config.experts and self.layers else 0
        self.top_k = config.experts.top_k if config.experts else 0
        self.values = torch.zeros(self.size(config), dtype=torch.float64, device=device)
        """Of each layer: choices of each expert, entropy, choices dropped. Last: auxiliary losses times predicted tokens."""

    @staticmethod
    def size(config: DecoderConfig) -> int:
        """How many numbers they are."""
        layers = sum(config.is_sparse(layer) for layer in range(config.num_layers))
        return layers * (config.experts.count + 2) + 1 if config.experts and layers else 0

    @torch.no_grad()
    def add(self, loss: Loss) -> None:
        """Adds a forward pass."""
        if self.layers:
            rows = [torch.cat([r.load, r.entropy.view(1), r.dropped.view(1)]) for r in loss.routing]
            extra = loss.total.detach() - loss.losses.sum()
            self.values += torch.cat([*rows, extra.view(1)]).double()

    def summary(self, values: Tensor, predicted: float) -> dict[str, Any] | None:
        """For metrics.jsonl, from the sums over all ranks. None without experts."""
        if not self.layers:
            return None
        table = values[:-1].view(self.layers, self.experts + 2)
        load = table[:, : self.experts]
        choices = load.sum()
        shares = load / load.sum(1, keepdim=True)
        return {
            "load": shares.mean(0).tolist(),
            "max_load": float(shares.max() * self.experts),
            "dropped": float(table[:, -1].sum() / choices),
            "entropy": float(table[:, -2].sum() / (choices / self.top_k)),
            "auxiliary_loss": float(values[-1] / max(predicted, 1.0)),
        }
