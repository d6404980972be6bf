"""A checkpoint on disk, read without any process group; and the checkpoints of a run folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, UsageError
from ..models.config import DecoderConfig
from ..storage.folders import clean_up, find_folders
from ..storage.tensors import ByteRange, Spec, TensorFile
from .manifest import NAME, Chunk, Manifest, TensorEntry

CHECKPOINTS, SNAPSHOTS, EXPORTS = "checkpoints", "snapshots", "hf"
"""Folders of a run."""
NAMES = {CHECKPOINTS: r"step-\d+", SNAPSHOTS: "[01]", EXPORTS: r"step-\d+"}
"""Patterns of the names of what is in them."""
HF_CONFIG = "hf_config.json"


class Checkpoint:
    """A complete checkpoint folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = Manifest.read(folder)
        self._files: dict[str, TensorFile] = {}

    def json(self, name: str) -> dict[str, Any]:
        """One of the JSON files: state.json, model.json, config.json."""
        try:
            values: dict[str, Any] = json.loads((self.folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.folder / name} cannot be read: {error}") from error
        return values

    @property
    def config(self) -> DecoderConfig:
        """The model's shape."""
        return DecoderConfig.from_dict(self.json("model.json"))

    @property
    def tokenizer(self) -> Path | None:
        """The tokenizer that travels along, if any."""
        path = self.folder / "tokenizer"
        return path if path.is_dir() else None

    @property
    def hf_config(self) -> dict[str, Any]:
        """The ``config.json`` that the model was converted from, if it was."""
        return self.json(HF_CONFIG) if (self.folder / HF_CONFIG).is_file() else {}

    def dtype_of(self, name: str) -> torch.dtype:
        """Of a weight."""
        return self._find(f"model/{name}")[1].dtype

    def read(self, name: str, start: int, count: int) -> Tensor:
        """Rows of a weight, by the model's name for it."""
        return self._read(f"model/{name}", start, count)

    def byte_range(self, name: str, start: int, count: int) -> ByteRange | None:
        """Where rows of a weight lie, if one box holds them in full width."""
        entry, spec = self._find(f"model/{name}")
        for chunk in entry.chunks:
            for row, stored, rows in _strips(chunk, spec):
                full_width = len(entry.shape) == 1 or chunk.sizes[-1] == entry.shape[-1]
                if full_width and row <= start and start + count <= row + rows:
                    return self._file(chunk.file).byte_range(chunk.key, stored + start - row, count)
        return None

    def tensor(self, name: str) -> Tensor:
        """A tensor in full, joined from its boxes. ``name`` is KIND/NAME."""
        entry, spec = self._find(name)
        return self._read(name, 0, spec.rows).view(entry.shape)

    def _find(self, name: str) -> tuple[TensorEntry, Spec]:
        if name not in self.manifest.tensors:
            raise CheckpointError(f"{self.folder} has no tensor {name!r}")
        entry = self.manifest.tensors[name]
        return entry, Spec(tuple(entry.shape), _dtype(entry))

    def _read(self, name: str, start: int, count: int) -> Tensor:
        entry, spec = self._find(name)
        out: Tensor | None = None
        for chunk in entry.chunks:
            for row, stored, rows in _strips(chunk, spec):
                a, b = max(start, row), min(start + count, row + rows)
                if b > a:
                    part = self._file(chunk.file).read(chunk.key, stored + a - row, b - a)
                    if part.shape == (count, *spec.row_shape):
                        return part
                    out = torch.empty((count, *spec.row_shape), dtype=spec.dtype) if out is None else out
                    columns = slice(chunk.offsets[-1], chunk.offsets[-1] + chunk.sizes[-1]) if part.dim() > 1 else ...
                    out[a - start : b - start, columns] = part
        assert out is not None, f"{name} has no boxes"
        return out

    def _file(self, name: str) -> TensorFile:
        if name not in self._files:
            try:
                self._files[name] = TensorFile(self.folder / name)
            except UsageError as error:
                raise CheckpointError(f"{error}; use an earlier checkpoint") from error
        return self._files[name]


def _strips(chunk: Chunk, spec: Spec) -> Iterator[tuple[int, int, int]]:
    """(row of the tensor, row of the box, number of rows) of a box: one run, or with three axes one for each of the first."""
    if len(chunk.sizes) < 3:
        yield chunk.offsets[0], 0, chunk.sizes[0]
        return
    outer, rows = chunk.sizes[0], chunk.sizes[1]
    for n in range(outer):
        yield (chunk.offsets[0] + n) * spec.shape[1] + chunk.offsets[1], n * rows, rows


def _dtype(entry: TensorEntry) -> torch.dtype:
    dtype = getattr(torch, entry.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"the manifest names a dtype {entry.dtype!r} that PyTorch does not know")
    return dtype


def complete_checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints and snapshots of a run folder, the newest step first."""
    folders = {f: name for place in (CHECKPOINTS, SNAPSHOTS) for name, f in find_folders(run / place, NAMES[place]).items()}
    steps = {f: step for f, name in folders.items() if (step := _step(f, name)) is not None}
    return sorted(steps, key=lambda f: (steps[f], f.parent.name), reverse=True)


def remove_leftovers(run: Path) -> None:
    """Removes what killed saves and exports have left in a run folder to which nobody else writes now."""
    for place, names in NAMES.items():
        clean_up(run / place, names)


def _step(folder: Path, name: str) -> int | None:
    """Step of a complete checkpoint, without reading its whole manifest where its name says it."""
    if not (folder / NAME).is_file():
        return None
    if name.startswith("step-"):
        return int(name.removeprefix("step-"))
    try:
        return Manifest.read(folder).step
    except CheckpointError:
        return None  # a damaged snapshot is none


def find_checkpoint(path: Path) -> Path:
    """A checkpoint folder, or the newest one of a run folder.

    Raises:
        CheckpointError: when there is neither.
    """
    if (path / NAME).is_file():
        return path
    if found := complete_checkpoints(path):
        return found[0]
    raise CheckpointError(f"{path} is neither a complete checkpoint (it has no {NAME}) nor a run folder that holds one")
