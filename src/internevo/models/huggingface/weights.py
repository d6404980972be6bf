"""Reads the weights of a Hugging Face folder.

Besides ``config.json`` it has ``model.safetensors``, or several files with ``model.safetensors.index.json``, or the older
``pytorch_model*.bin`` (read with ``weights_only=True``). The families know the names of the tensors. No code in a folder is
ever run.
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
    """The tensors of a Hugging Face folder, by their names on disk. They are read only when they are needed.

    Raises:
        UsageError: if the folder has no weights, or its index does not fit its files.
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
        raise UsageError(f"{folder} has no weights (model*.safetensors or pytorch_model*.bin)")

    def _read_index(self, path: Path) -> None:
        try:
            names = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
            self.files = {name: self.folder / file for name, file in names.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{path} is not an index of weights: {type(error).__name__}: {error}") from error
        missing = sorted({f.name for f in self.files.values() if not f.is_file()})
        if missing:
            raise UsageError(f"{path} names the file {missing[0]}, which is not in the folder; copy it there")

    def _open(self, path: Path) -> TensorFile | _BinFile:
        if path not in self._files:
            self._files[path] = _BinFile(path) if path.suffix == ".bin" else TensorFile(path)
        return self._files[path]

    def spec(self, name: str) -> Spec:
        """Returns the shape and dtype of a tensor."""
        file = self._open(self.files[name])
        if name not in file.specs:
            raise UsageError(f"{self.files[name]} has no tensor {name!r}, although the index says so")
        return file.specs[name]

    def read(self, name: str, start: int, count: int) -> Tensor:
        """Reads rows ``start`` to ``start + count`` of a tensor."""
        return self._open(self.files[name]).read(name, start, count)

    def byte_range(self, name: str, start: int, count: int) -> ByteRange | None:
        """Returns where these rows are in a file; None if the file is a .bin file."""
        return self._open(self.files[name]).byte_range(name, start, count)


class _BinFile:
    """An older file of pickled tensors. It is read without running code."""

    def __init__(self, path: Path) -> None:
        try:
            self._tensors: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
            raise UsageError(
                f"{path} is refused: it is damaged, or contains objects other than tensors; use safetensors files. ({error})"
            ) from None
        self.specs = {name: Spec(tuple(t.shape), t.dtype) for name, t in self._tensors.items()}

    def read(self, name: str, start: int, count: int) -> Tensor:
        return as_rows(self._tensors[name])[start : start + count].clone()

    def byte_range(self, name: str, start: int, count: int) -> None:
        """Returns None: the file is a zip archive."""


def read_config(folder: Path) -> dict[str, Any]:
    """Reads ``config.json`` of a Hugging Face folder.

    Raises:
        UsageError: if the folder has no ``config.json``, or it is not a JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UsageError(f"{folder} is not a Hugging Face folder: it has no config.json")
    return read_object(path)
