"""Merges adapters into the weights of a model while it is read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...storage.tensors import ByteRange
from ..decoder import parameter_shapes
from ..linear import ADAPTER_INFIX
from ..source import ParameterSource


class Merged:
    """A model with adapters, as a source of a model without them: its weights are W + alpha / rank * B A."""

    def __init__(self, source: ParameterSource) -> None:
        config = source.config
        assert config.lora is not None
        self.source, self.lora = source, config.lora
        self.config = replace(config, lora=None)
        self.tokenizer = source.tokenizer
        self.hf_config: dict[str, Any] = source.hf_config
        self.adapters = {name for name in parameter_shapes(config) if ADAPTER_INFIX in name}

    def dtype_of(self, name: str) -> torch.dtype:
        """Returns the dtype of a parameter, which adapters do not change."""
        return self.source.dtype_of(name)

    def read(self, name: str, start: int, count: int) -> Tensor:
        """Returns rows of a parameter. If it has an adapter, the product B A is computed in fp32 and added."""
        rows, adapter = self.source.read(name, start, count), self._adapter(name)
        if adapter is None:
            return rows
        a = self.source.read(f"{adapter}.a.weight", 0, self.lora.rank)
        b = self.source.read(f"{adapter}.b.weight", start, count)
        change = b.float() @ a.float() * (self.lora.alpha / self.lora.rank)
        return (rows.float() + change.view(rows.shape)).to(rows.dtype)

    def byte_range(self, name: str, start: int, count: int) -> ByteRange | None:
        """Returns where these rows are in a file; None if an adapter is added to them."""
        return None if self._adapter(name) else self.source.byte_range(name, start, count)

    def _adapter(self, name: str) -> str | None:
        path = name.removesuffix(".weight") + ADAPTER_INFIX.removesuffix(".")
        return path if f"{path}.a.weight" in self.adapters else None


def merged(source: ParameterSource) -> ParameterSource:
    """Returns ``source`` itself if it has no adapters, and otherwise a source with the adapters merged."""
    return source if source.config.lora is None else Merged(source)
