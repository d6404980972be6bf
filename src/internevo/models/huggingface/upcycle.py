"""Sparse upcycling: a dense model, while it is read, becomes one with experts (https://arxiv.org/abs/2212.05055).

Every expert is a copy of the layer's MLP. The weights of a token's experts add up to 1, so whatever the router chooses, the
output is that of the MLP. The router starts with small random numbers.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...errors import UsageError
from ...storage.header import Spec
from ...storage.tensors import ByteRange
from ..config import DecoderConfig, Experts
from ..decoder import parameter_shapes
from ..families import mixtral, qwen2moe, qwen3moe
from ..init import Initializer
from ..source import ParameterSource
from .folder import as_family

ROUTER_STD = 0.02
"""The standard deviation of the routers' weights."""
FAMILIES = (mixtral, qwen2moe, qwen3moe)
"""The families that a model can become. The first that describes its other parts exactly is chosen."""


class Upcycled:
    """A dense model as a source of one with experts.

    A shared expert has copies of ``gate`` and ``up``; its ``down`` and its own gate are 0, so it adds nothing at the start.
    """

    def __init__(self, source: ParameterSource, config: DecoderConfig, seed: int) -> None:
        """
        Args:
            config: the model with experts. Besides the experts it is that of ``source``.
            seed: of the routers' weights.
        """
        self.source, self.config, self.tokenizer = source, config, source.tokenizer
        self.hf_config: dict[str, Any] = {}
        self.initializer = Initializer(seed, lambda name: ROUTER_STD)
        self._shapes, self._dense_shapes = parameter_shapes(config), parameter_shapes(source.config)

    def dtype_of(self, name: str) -> torch.dtype:
        """Returns the dtype of a parameter: that of the one it is a copy of, or of the MLP's ``gate``."""
        return self.source.dtype_of(_copied(name) or re.sub(r"\.mlp\..*", ".mlp.gate.weight", name))

    def read(self, name: str, start: int, count: int) -> Tensor:
        """Returns rows of a parameter."""
        shape, dense = self._shapes[name], _copied(name)
        if name.endswith(".router.weight"):
            return self.initializer.rows(name, shape, start, start + count).to(self.dtype_of(name))
        if dense is None:
            return torch.zeros(count, shape[-1], dtype=self.dtype_of(name))
        rows, parts, end = self._rows(dense), list[Tensor](), start + count
        while start < end:  # one expert after the other
            parts.append(self.source.read(dense, start % rows, min(rows - start % rows, end - start)))
            start += len(parts[-1])
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def byte_range(self, name: str, start: int, count: int) -> ByteRange | None:
        """Returns where these rows are in a file, if they are a copy of rows there."""
        dense = _copied(name)
        if dense is None or start % self._rows(dense) + count > self._rows(dense):
            return None
        return self.source.byte_range(dense, start % self._rows(dense), count)

    def _rows(self, dense: str) -> int:
        return Spec(tuple(self._dense_shapes[dense]), torch.float32).rows


def _copied(name: str) -> str | None:
    """Returns the parameter of the dense model that a parameter consists of copies of; None if it is new."""
    if name.endswith((".router.weight", ".shared.down.weight", ".shared_gate.weight")):
        return None
    return re.sub(r"\.mlp\.(experts|shared)\.", ".mlp.", name)


def upcycled(source: ParameterSource, count: int, top_k: int, seed: int) -> Upcycled:
    """Makes a model with experts from a dense one.

    Args:
        count: number of experts in each layer.
        top_k: number of experts that each token chooses.
        seed: of the routers' weights.

    Raises:
        UsageError: if ``source`` has experts already, or no family with experts has its other parts.
    """
    config = source.config
    if config.experts is not None:
        raise UsageError(
            f"the source already has {config.experts.count} experts per layer ({config.family}): upcycling needs a dense model"
        )
    reasons = []
    for module in FAMILIES:
        shared = config.intermediate_size if module is qwen2moe else 0
        experts = Experts(count, top_k, config.intermediate_size, shared_size=shared)
        try:
            return Upcycled(source, as_family(replace(config, experts=experts), module.FAMILY), seed)
        except UsageError as error:
            reasons.append(f"  {module.FAMILY}: {error}\n")
    raise UsageError(f"no family with experts has the other parts of this {config.family} model:\n{''.join(reasons).rstrip()}")
