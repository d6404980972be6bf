"""The engine of Hugging Face interchange: which rows of which tensor on disk are which rows of which parameter.

A folder is ``config.json`` and either ``model.safetensors``, or shards with ``model.safetensors.index.json``, or the
older ``pytorch_model*.bin`` (read with ``weights_only=True``). The names in it belong to the families. No code from a folder is
ever run.

Every family's layout on disk is made of whole rows (``internevo.tensorfile`` says what a row is): q, k and v in one tensor
are rows of it, and the tensors of single experts are rows of one parameter.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from ..jsonfile import read_object
from ..tensorfile import Place, Spec, TensorFile, as_rows


@dataclass(frozen=True)
class Piece:
    """Rows of a tensor on disk; by default all of them."""

    disk: str
    start: int = 0
    count: int | None = None


Names = dict[str, list[Piece]]
"""Parameter -> the pieces that it is made of, in order."""


@dataclass(frozen=True)
class Span:
    """Rows that a parameter and a tensor on disk have in common."""

    parameter: str
    row: int
    disk: str
    disk_row: int
    count: int


class Naming:
    """A family's names on disk for a model of given shapes."""

    def __init__(self, names: Names, shapes: dict[str, torch.Size]) -> None:
        """``names`` of the parameters in ``shapes``, both in the same order."""
        assert names.keys() == shapes.keys(), sorted(names.keys() ^ shapes.keys())
        self.by_parameter: dict[str, list[Span]] = {}
        self.by_disk: dict[str, list[Span]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Of the tensors on disk."""
        for parameter, pieces in names.items():
            spec = Spec(tuple(shapes[parameter]), torch.float32)
            row = 0
            for piece in pieces:
                count = piece.count if piece.count is not None else spec.rows // len(pieces)
                span = Span(parameter, row, piece.disk, piece.start, count)
                self.by_parameter.setdefault(parameter, []).append(span)
                self.by_disk.setdefault(piece.disk, []).append(span)
                row += count
            assert row == spec.rows, f"{parameter} has {spec.rows} rows, and its pieces {row}"
        for disk, spans in self.by_disk.items():
            spans.sort(key=lambda span: span.disk_row)
            columns = Spec(tuple(shapes[spans[0].parameter]), torch.float32).row_shape
            self.shapes[disk] = (sum(span.count for span in spans), *columns)


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

    def place(self, name: str, start: int, count: int) -> Place | None:
        """Where rows lie, if they lie in one piece."""
        return self._open(self.files[name]).place(name, start, count)


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

    def place(self, name: str, start: int, count: int) -> None:
        """Nowhere: the file is an archive."""


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a Hugging Face folder."""
    path = folder / "config.json"
    if not path.is_file():
        raise UsageError(f"{folder} is no Hugging Face folder: it has no config.json")
    return read_object(path)


def overlap(spans: list[Span], start: int, count: int) -> Iterator[tuple[Span, int, int]]:
    """(span, first row within it, number of rows) that make up a parameter's rows ``start`` to ``start + count``."""
    for span in spans:
        a, b = max(start, span.row), min(start + count, span.row + span.count)
        if b > a:
            yield span, a - span.row, b - a


def parse_size(text: str) -> int:
    """ "5GB" in bytes (powers of ten, as on the Hugging Face side)."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    number, unit = text[:-2], text[-2:].upper()
    try:
        return int(float(number) * units[unit])
    except (KeyError, ValueError):
        raise UsageError(f"size {text!r} is not a number with KB, MB, GB or TB") from None
