"""The engine of Hugging Face interchange: reads and writes folders; the names in them belong to the families.

A folder is ``config.json`` and either ``model.safetensors``, or shards with ``model.safetensors.index.json``, or the
older ``pytorch_model*.bin`` (read with ``weights_only=True``). No code from a folder is ever run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import UsageError


@dataclass(frozen=True)
class Entry:
    """One tensor on disk and the parameter(s) it holds."""

    disk: str
    parts: tuple[str, ...]
    split: Callable[[Tensor], list[Tensor]] = lambda tensor: [tensor]
    join: Callable[[list[Tensor]], Tensor] = lambda tensors: tensors[0]


class Weights:
    """Lazily read tensors of a Hugging Face folder, by their names on disk.

    Raises:
        UsageError: when the folder holds no weights, or its index and its files do not fit.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, Path] = {}
        self._bins: dict[Path, dict[str, Tensor]] = {}
        for name, read in (
            ("model.safetensors.index.json", self._index),
            ("model.safetensors", self._single),
            ("pytorch_model.bin.index.json", self._index),
            ("pytorch_model.bin", self._single),
        ):
            if (folder / name).is_file():
                read(folder / name)
                return
        raise UsageError(f"{folder} holds no weights (model*.safetensors or pytorch_model*.bin)")

    def _index(self, path: Path) -> None:
        try:
            names = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError) as error:
            raise UsageError(f"{path} is no index of weights: {error}") from error
        self.files = {name: self.folder / file for name, file in names.items()}
        missing = sorted({f.name for f in self.files.values() if not f.is_file()})
        if missing:
            raise UsageError(f"{path} names {missing[0]}, which is not in the folder")

    def _single(self, path: Path) -> None:
        names = list(self._bin(path)) if path.suffix == ".bin" else _safetensors_names(path)
        self.files = dict.fromkeys(names, path)

    def _bin(self, path: Path) -> dict[str, Tensor]:
        if path not in self._bins:
            self._bins = {path: torch.load(path, map_location="cpu", weights_only=True, mmap=True)}
        return self._bins[path]

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.files:
            raise UsageError(f"{self.folder} has no tensor {name!r}")
        path = self.files[name]
        if path.suffix == ".bin":
            return self._bin(path)[name]
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise UsageError(f"{path}, tensor {name!r}: {error}") from error


def _safetensors_names(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path} is not a safetensors file: {error}") from error


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a Hugging Face folder."""
    path = folder / "config.json"
    if not path.is_file():
        raise UsageError(f"{folder} is no Hugging Face folder: it has no config.json")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path} does not hold a JSON object")
    return values


def read_tensors(weights: Weights, entries: Iterable[Entry]) -> Iterator[tuple[str, Tensor]]:
    """(parameter name, tensor) for every part of every entry, one tensor on disk at a time."""
    for entry in entries:
        tensor = weights[entry.disk]
        yield from zip(entry.parts, entry.split(tensor), strict=True)


def disk_tensors(entries: Iterable[Entry], parameter: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """(name on disk, tensor) of every entry, taking parameters one at a time from ``parameter(name)``."""
    for entry in entries:
        yield entry.disk, entry.join([parameter(part) for part in entry.parts]).contiguous()


def parse_size(text: str) -> int:
    """ "5GB" in bytes (powers of ten, as on the Hugging Face side)."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    number, unit = text[:-2], text[-2:].upper()
    try:
        return int(float(number) * units[unit])
    except (KeyError, ValueError):
        raise UsageError(f"size {text!r} is not a number with KB, MB, GB or TB") from None


class FolderWriter:
    """Writes tensors, as they come, to shards of at most ``shard_bytes``, and the index when there are several."""

    def __init__(self, folder: Path, shard_bytes: int = 5 * 10**9) -> None:
        self.folder, self.shard_bytes = folder, shard_bytes
        self.pending: dict[str, Tensor] = {}
        self.shards: list[list[str]] = []
        self.total = 0
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, name: str, tensor: Tensor) -> None:
        """Adds one tensor; writes the shard that is full before it."""
        if self.pending and sum(t.nbytes for t in self.pending.values()) + tensor.nbytes > self.shard_bytes:
            self._flush()
        self.pending[name] = tensor
        self.total += tensor.nbytes

    def _flush(self) -> None:
        self.shards.append(list(self.pending))
        save_file(self.pending, self.folder / f"shard-{len(self.shards)}.tmp", metadata={"format": "pt"})
        self.pending = {}

    def finish(self, config: dict[str, Any]) -> None:
        """Writes the rest, gives the shards their names, and writes config.json last."""
        self._flush()
        count = len(self.shards)
        weight_map = {}
        for number, names in enumerate(self.shards, start=1):
            file = "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            (self.folder / f"shard-{number}.tmp").replace(self.folder / file)
            weight_map.update(dict.fromkeys(names, file))
        index = self.folder / "model.safetensors.index.json"
        if count > 1:
            index.write_text(json.dumps({"metadata": {"total_size": self.total}, "weight_map": weight_map}, indent=2))
        else:
            index.unlink(missing_ok=True)
        (self.folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
