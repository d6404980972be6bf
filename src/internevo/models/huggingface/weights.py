"""The engine of Hugging Face interchange: which rows of which tensor on disk are which rows of which parameter.

A folder is ``config.json`` and either ``model.safetensors``, or shards with ``model.safetensors.index.json``, or the
older ``pytorch_model*.bin`` (read with ``weights_only=True``). The names in it belong to the families. No code from a folder is
ever run.

Every family's layout on disk is made of whole rows (``internevo.storage.tensors`` says what a row is): q, k and v in one tensor
are rows of it, and the tensors of single experts are rows of one parameter.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import UsageError
from ...storage.jsonfile import read_object
from ...storage.tensors import ByteRange, Spec, TensorFile, as_rows


class Weights:
    """Lazily read tensors of a Hugging Face folder, by their names on disk.

    Raises:
        UsageError: when the folder holds no weights, or its index and its files do not fit.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[Path, TensorFile | _BinFile] = {}
        self.files: dict[str, Path] = {}
        for name in ("model.safetensors", "pytorch_model.bin"):
            if (folder / f"{name}.index.json").is_file():
                self._read_index(folder / f"{name}.index.json")
                return
            if (folder / name).is_file():
                self.files = dict.fromkeys(self._open(folder / name).specs, folder / name)
                return
        raise UsageError(f"{folder} holds no weights (model*.safetensors or pytorch_model*.bin)")

    def _read_index(self, path: Path) -> None:
        try:
            names = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            self.files = {name: self.folder / file for name, file in names.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{path} is no index of weights: {error}") from error
        missing = sorted({f.name for f in self.files.values() if not f.is_file()})
        if missing:
            raise UsageError(f"{path} names {missing[0]}, which is not in the folder")

    def _open(self, path: Path) -> TensorFile | _BinFile:
        if path not in self._files:
            self._files[path] = _BinFile(path) if path.suffix == ".bin" else TensorFile(path)
        return self._files[path]

    def spec(self, name: str) -> Spec:
        """Shape and dtype of a tensor."""
        file = self._open(self.files[name])
        if name not in file.specs:
            raise UsageError(f"{self.files[name]} has no tensor {name!r}, which the index says is in it")
        return file.specs[name]

    def read(self, name: str, start: int, count: int) -> Tensor:
        """Rows of a tensor."""
        return self._open(self.files[name]).read(name, start, count)

    def byte_range(self, name: str, start: int, count: int) -> ByteRange | None:
        """Where rows lie, if they lie in one piece."""
        return self._open(self.files[name]).byte_range(name, start, count)


class _BinFile:
    """An older file of pickled tensors, read without running code."""

    def __init__(self, path: Path) -> None:
        try:
            self._tensors: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (OSError, RuntimeError, pickle.UnpicklingError) as error:
            raise UsageError(
                f"{path} is refused: it holds something else than tensors, or is damaged; ask for safetensors. ({error})"
            ) from None
        self.specs = {name: Spec(tuple(t.shape), t.dtype) for name, t in self._tensors.items()}

    def read(self, name: str, start: int, count: int) -> Tensor:
        return as_rows(self._tensors[name])[start : start + count].clone()

    def byte_range(self, name: str, start: int, count: int) -> None:
        """Nowhere: the file is an archive."""


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a Hugging Face folder."""
    path = folder / "config.json"
    if not path.is_file():
        raise UsageError(f"{folder} is no Hugging Face folder: it has no config.json")
    return read_object(path)
