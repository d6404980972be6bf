"""Statistics of the routers of a mixture of experts in a step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..models.config import DecoderConfig
from ..models.losses import Loss


class RouterSums:
    """Sums over the tokens of a step. They are one vector, which the all-reduce of a step adds up over the ranks."""

    def __init__(self, config: DecoderConfig, device: torch.device) -> None:
        self.layers = sum(config.is_sparse(layer) for layer in range(config.num_layers))
        self.experts = config.experts.count if config.experts and self.layers else 0
        self.top_k = config.experts.top_k if config.experts else 0
        self.values = torch.zeros(self.size(config), dtype=torch.float64, device=device)
        """For each layer: how many tokens chose each expert, the sum of the entropies, and the number of dropped choices. After
        all layers: the auxiliary losses times the number of predicted tokens."""

    @staticmethod
    def size(config: DecoderConfig) -> int:
        """Returns the length of the vector; 0 if the model has no experts."""
        layers = sum(config.is_sparse(layer) for layer in range(config.num_layers))
        return layers * (config.experts.count + 2) + 1 if config.experts and layers else 0

    @torch.no_grad()
    def add(self, loss: Loss) -> None:
        """Adds the statistics of a forward pass."""
        if self.layers:
            rows = [torch.cat([r.load, r.entropy.view(1), r.dropped.view(1)]) for r in loss.routing]
            extra = loss.total.detach() - loss.losses.sum()
            self.values += torch.cat([*rows, extra.view(1)]).double()

    def summary(self, values: Tensor, predicted: float) -> dict[str, Any] | None:
        """Returns the statistics for metrics.jsonl; None if the model has no experts.

        Args:
            values: the sums over all ranks.
            predicted: number of predicted tokens of the step.
        """
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
