"""A checkpoint on disk, read without any process group; and the checkpoints of a run folder."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..models import DecoderConfig
from .manifest import NAME, Manifest, TensorEntry
from .storage import open_file

CHECKPOINTS, SNAPSHOTS = "checkpoints", "snapshots"


class Checkpoint:
    """A complete checkpoint folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = Manifest.read(folder)

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
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        entry = next(e for n, e in self.manifest.tensors.items() if n.startswith("model/"))
        return dtype_of(entry)

    @property
    def tokenizer(self) -> Path | None:
        """The tokenizer that travels along, if any."""
        path = self.folder / "tokenizer"
        return path if path.is_dir() else None

    def parameter(self, name: str) -> Tensor:
        """A weight in full, by the model's name for it."""
        return self.tensor(f"model/{name}")

    def tensor(self, name: str) -> Tensor:
        """A tensor in full, joined from its boxes. ``name`` is KIND/NAME."""
        if name not in self.manifest.tensors:
            raise CheckpointError(f"{self.folder} has no tensor {name!r}")
        entry = self.manifest.tensors[name]
        full = torch.empty(entry.shape, dtype=dtype_of(entry))
        for chunk in entry.chunks:
            with open_file(self.folder / chunk.file) as file:
                box = tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))
                full[box] = file.get_tensor(chunk.key)
        return full


def dtype_of(entry: TensorEntry) -> torch.dtype:
    """A stored tensor's dtype."""
    dtype = getattr(torch, entry.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"the manifest names a dtype {entry.dtype!r} that PyTorch does not know")
    return dtype


def complete_checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints and snapshots of a run folder, the newest step first."""
    folders = [*(run / CHECKPOINTS).glob("step-*"), *(run / SNAPSHOTS).glob("[01]")]
    steps = {f: step for f in folders if (step := _step(f)) is not None}
    return sorted(steps, key=lambda f: (steps[f], f.parent.name), reverse=True)


def _step(folder: Path) -> int | None:
    """Step of a complete checkpoint, without reading its whole manifest where the name says it."""
    if not (folder / NAME).is_file():
        return None
    match = re.fullmatch(r"step-(\d+)", folder.name)
    if match:
        return int(match[1])
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
