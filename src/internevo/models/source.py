"""Where the parameters of a model come from, a few rows at a time: a folder, a checkpoint, or a model in memory."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..storage.tensors import ByteRange, ShardWriter, Spec, as_rows
from .config import DecoderConfig
from .decoder import parameter_shapes


class Source(Protocol):
    """Where the parameters of a model come from: a Hugging Face folder, a checkpoint, a model in memory."""

    @property
    def config(self) -> DecoderConfig:
        """The model."""

    @property
    def tokenizer(self) -> Path | None:
        """File or folder of the tokenizer that belongs to it."""

    @property
    def hf_config(self) -> dict[str, Any]:
        """The ``config.json`` that it came with, if it came from Hugging Face."""

    def dtype_of(self, name: str) -> torch.dtype:
        """Of a parameter, by our name: it holds every value of it."""

    def read(self, name: str, start: int, count: int) -> Tensor:
        """Rows of a parameter, by our name (``internevo.storage.tensors`` says what a row is)."""

    def byte_range(self, name: str, start: int, count: int) -> ByteRange | None:
        """Where those rows lie, if they lie in one piece in a file."""


class Module:
    """A model in memory as a source."""

    def __init__(self, config: DecoderConfig, model: nn.Module) -> None:
        self.config, self.tokenizer = config, None
        self.hf_config: dict[str, Any] = {}
        self._parameters = {name: p.detach() for name, p in model.named_parameters()}

    def dtype_of(self, name: str) -> torch.dtype:
        """Of a parameter."""
        return self._parameters[name].dtype

    def read(self, name: str, start: int, count: int) -> Tensor:
        """Rows of a parameter."""
        return as_rows(self._parameters[name])[start : start + count]

    def byte_range(self, name: str, start: int, count: int) -> None:
        """Nowhere."""


@torch.no_grad()
def fill(model: nn.Module, source: Source) -> None:
    """Copies every parameter of a plain model."""
    for name, mine in model.named_parameters():
        rows = Spec(tuple(mine.shape), mine.dtype).rows
        mine.copy_(source.read(name, 0, rows).view(mine.shape))


def dtypes(source: Source) -> list[torch.dtype]:
    """Of all parameters, that of most values first."""
    values: Counter[torch.dtype] = Counter()
    for name, shape in parameter_shapes(source.config).items():
        values[source.dtype_of(name)] += shape.numel()
    return [dtype for dtype, _ in values.most_common()]


def usual_dtype(source: Source) -> torch.dtype:
    """Of most values: what to compute in."""
    return dtypes(source)[0]


def pour(source: Source, name: str, row: int, count: int, dtype: torch.dtype, writer: ShardWriter) -> int:
    """Hands rows of a parameter to a writer, unread where they can stay as they are. Returns the bytes written."""
    place = source.byte_range(name, row, count)
    if place is not None and place.dtype == dtype:
        writer.copy(place)
        return place.nbytes
    rows = source.read(name, row, count).to("cpu", dtype)
    writer.add(rows)
    return rows.nbytes
