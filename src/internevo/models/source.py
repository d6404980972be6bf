"""Sources of a model's parameters, which are read a few rows at a time: a folder, a checkpoint, or a model in memory."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..storage.header import Spec
from ..storage.tensors import ByteRange, ShardWriter, as_rows
from .config import DecoderConfig
from .decoder import Decoder, parameter_shapes


class ParameterSource(Protocol):
    """A source of a model's parameters: a Hugging Face folder, a checkpoint, or a model in memory.

    Parameters have their names in ``Decoder``; the routers' balance biases are among them. ``internevo.storage.tensors`` says
    what the rows of a parameter are.
    """

    @property
    def config(self) -> DecoderConfig:
        """The shape of the model."""

    @property
    def tokenizer(self) -> Path | None:
        """The file or folder of the model's tokenizer."""

    @property
    def hf_config(self) -> dict[str, Any]:
        """The ``config.json`` of the Hugging Face folder that the model was read from; empty if it was not."""

    def dtype_of(self, name: str) -> torch.dtype:
        """Returns the dtype of a parameter. It holds all values without rounding."""

    def read(self, name: str, start: int, count: int) -> Tensor:
        """Reads rows ``start`` to ``start + count`` of a parameter."""

    def byte_range(self, name: str, start: int, count: int) -> ByteRange | None:
        """Returns where these rows are in a file, if they are one range of bytes in one file; otherwise None."""


class ModelInMemory:
    """A model in memory as a source of parameters."""

    def __init__(self, config: DecoderConfig, model: Decoder, tokenizer: Path | None = None) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.hf_config: dict[str, Any] = {}
        self._parameters = {name: tensor.detach() for name, tensor in model.stored().items()}

    def dtype_of(self, name: str) -> torch.dtype:
        """Returns the dtype of a parameter."""
        return self._parameters[name].dtype

    def read(self, name: str, start: int, count: int) -> Tensor:
        """Returns rows of a parameter."""
        return as_rows(self._parameters[name])[start : start + count]

    def byte_range(self, name: str, start: int, count: int) -> None:
        """Returns None: the rows are not in a file."""


@torch.no_grad()
def load_parameters(model: Decoder, source: ParameterSource) -> None:
    """Copies all parameters from ``source`` into ``model``, which is not sharded."""
    for name, mine in model.stored().items():
        rows = Spec(tuple(mine.shape), mine.dtype).rows
        mine.copy_(source.read(name, 0, rows).view(mine.shape))


def dtypes(source: ParameterSource) -> list[torch.dtype]:
    """Returns the dtypes of all parameters. The one that the most values have is first."""
    values: Counter[torch.dtype] = Counter()
    for name, shape in parameter_shapes(source.config).items():
        values[source.dtype_of(name)] += shape.numel()
    return [dtype for dtype, _ in values.most_common()]


def most_common_dtype(source: ParameterSource) -> torch.dtype:
    """Returns the dtype that the most values have; a model is computed in it."""
    return dtypes(source)[0]


def write_rows(source: ParameterSource, name: str, row: int, count: int, dtype: torch.dtype, writer: ShardWriter) -> int:
    """Gives rows ``row`` to ``row + count`` of a parameter to ``writer``, in ``dtype``. Returns how many bytes these are.

    Rows that are already in a file in this dtype are copied from file to file.
    """
    stored = source.byte_range(name, row, count)
    if stored is not None and stored.dtype == dtype:
        writer.copy(stored)
        return stored.nbytes
    rows = source.read(name, row, count).to("cpu", dtype)
    writer.add(rows)
    return rows.nbytes
