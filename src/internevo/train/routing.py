"""Statistics of the routers of a mixture of experts in a step, and balancing by them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..models.config import DecoderConfig
from ..models.losses import Routed
from ..models.moe import Router


class RouterSums:
    """Sums over the tokens of a step: those of this rank until they are reduced, and then those of all ranks. They are one
    vector, which the all-reduce of a step adds up."""

    def __init__(self, config: DecoderConfig, device: torch.device) -> None:
        self.sparse = [layer for layer in range(config.num_layers) if config.is_sparse(layer)]
        self.layers = len(self.sparse)
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
    def add(self, routed: Routed) -> None:
        """Adds the statistics of a forward pass through a model or a stage of it."""
        if not self.layers:
            return
        table = self._table(self.values)
        for layer, r in routed.sums.items():
            table[self.sparse.index(layer)] += torch.cat([r.load, r.entropy.view(1), r.dropped.view(1)]).double()
        if routed.loss is not None:
            self.values[-1] += routed.loss.detach().double()

    def balance(self, routers: dict[int, Router], values: Tensor, speed: Tensor) -> None:
        """Moves the balance biases of routers, without waiting for a GPU.

        Args:
            routers: layer -> its router, for the layers of this rank.
            values: ``values`` of all ranks, on the device.
            speed: by how much; a scalar in fp64 on the device.
        """
        for layer, router in routers.items():
            router.balance(self._table(values)[self.sparse.index(layer), : self.experts], speed)

    def summary(self, predicted: float) -> dict[str, Any] | None:
        """Returns the statistics of all ranks for metrics.jsonl; None if the model has no experts.

        Args:
            predicted: number of predicted tokens of the step.
        """
        if not self.layers:
            return None
        table = self._table(self.values)
        load = table[:, : self.experts]
        choices = load.sum()
        shares = load / load.sum(1, keepdim=True)
        return {
            "load": shares.mean(0).tolist(),
            "max_load": float(shares.max() * self.experts),
            "dropped": float(table[:, -1].sum() / choices),
            "entropy": float(table[:, -2].sum() / (choices / self.top_k)),
            "auxiliary_loss": float(self.values[-1] / max(predicted, 1.0)),
        }

    def _table(self, values: Tensor) -> Tensor:
        return values[:-1].view(self.layers, self.experts + 2)
