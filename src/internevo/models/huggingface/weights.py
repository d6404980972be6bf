"""Reads the weights of a Hugging Face folder.

Besides ``config.json`` it has ``model.safetensors``, or several files with ``model.safetensors.index.json``, or the older
``pytorch_model*.bin`` (read with ``weights_only=True``). The families know the names of the tensors. No code in a folder is
ever run.
"""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from ...errors import UsageError
from ...storage.header import Spec
from ...storage.jsonfile import read_object
from ...storage.tensors import ByteRange, TensorFile, as_rows


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
            index = folder / f"{name}.index.json"
            if (folder / name).is_file():
                self.files = dict.fromkeys(self._open(folder / name).specs, folder / name)
                return
            if index.is_file():
                self._read_index(index)
                return
        if shards := sorted((*folder.glob("model-*.safetensors"), *folder.glob("pytorch_model-*.bin"))):
            missing = f"{shards[0].name.partition('-')[0]}{shards[0].suffix}.index.json"
            raise UsageError(f"{shards[0]} is there, but {missing} is not, which says what is in which file; copy it there")
        raise UsageError(f"{folder} has no weights (model*.safetensors or pytorch_model*.bin)")

    def _read_index(self, path: Path) -> None:
        names = read_object(path).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(f, str) and Path(f).name == f for f in names.values()):
            raise UsageError(f"{path} is not an index of weights: its weight_map must have the name of a file for every tensor")
        self.files = {name: self.folder / file for name, file in names.items()}
        files = sorted(set(self.files.values()))
        if missing := [file.name for file in files if not file.is_file()]:
            raise UsageError(f"{path} names {', '.join(missing)}, which the folder does not have; copy the missing files there")
        for file in files:
            for name in self._open(file).specs:
                if self.files.get(name) != file:
                    where = f"says that it is in {self.files[name].name}" if name in self.files else "does not have it"
                    raise UsageError(f"{file} has a tensor {name!r}, but {path.name} {where}")

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
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except (OSError, RuntimeError, EOFError, ValueError, LookupError, TypeError, pickle.UnpicklingError) as error:
            raise UsageError(
                f"{path} is refused: it is damaged, or contains objects other than tensors; use safetensors files. ({error})"
            ) from None
        if not isinstance(loaded, dict):
            raise UsageError(f"{path} is refused: it has a {type(loaded).__name__} in place of named tensors")
        for name, value in loaded.items():
            dense = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized
            if not isinstance(name, str) or not dense:
                raise UsageError(f"{path} is refused: {name!r} is not a dense tensor, but a {type(value).__name__}")
        self._tensors: dict[str, Tensor] = loaded
        self.specs = {name: Spec(tuple(t.shape), t.dtype) for name, t in self._tensors.items()}

    def read(self, name: str, start: int, count: int) -> Tensor:
        return as_rows(self._tensors[name])[start : start + count].clone()

    def byte_range(self, name: str, start: int, count: int) -> None:
        """Returns None: the file is a zip archive."""
