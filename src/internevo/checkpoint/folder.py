"""Reads a checkpoint folder without process groups, and finds the checkpoints of a run folder."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, UsageError
from ..models.config import DecoderConfig
from ..models.decoder import parameter_shapes, stored_shapes
from ..models.linear import ADAPTER_INFIX
from ..storage.folders import clean_up, find_folders
from ..storage.header import Spec
from ..storage.tensors import ByteRange, TensorFile
from .manifest import CHECKPOINTS as CHECKPOINTS
from .manifest import NAME, Chunk, Head, Manifest, TensorEntry, instead

SNAPSHOTS, EXPORTS = "snapshots", "hf"
"""Names of folders in a run folder, besides CHECKPOINTS."""
NAMES = {CHECKPOINTS: "step-[0-9]+", SNAPSHOTS: "[01]", EXPORTS: "step-[0-9]+"}
"""Such a folder -> regular expression of the names of the folders in it."""
HF_CONFIG = "hf_config.json"
"""File with the ``config.json`` of the Hugging Face folder that a checkpoint was converted from."""


def checkpoint_name(step: int) -> str:
    """Returns the name of a checkpoint's folder."""
    return f"step-{step:08d}"


class Checkpoint:
    """A complete checkpoint folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = Manifest.read(folder)
        self._files: dict[str, TensorFile] = {}

    def json(self, name: str) -> dict[str, Any]:
        """Reads one of the JSON files: state.json, model.json, config.json."""
        try:
            values: dict[str, Any] = json.loads((self.folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.folder / name} cannot be read: {error}; {instead(self.folder)}") from error
        return values

    @property
    def config(self) -> DecoderConfig:
        """The model's shape."""
        try:
            return DecoderConfig.from_dict(self.json("model.json"))
        except (KeyError, TypeError, AttributeError) as error:
            path = self.folder / "model.json"
            raise CheckpointError(f"{path} does not describe a model: {type(error).__name__}: {error}") from error

    @property
    def tokenizer(self) -> Path | None:
        """The folder of the tokenizer, if the checkpoint has one."""
        path = self.folder / "tokenizer"
        return path if path.is_dir() else None

    @property
    def hf_config(self) -> dict[str, Any]:
        """The ``config.json`` of the Hugging Face folder that the checkpoint was converted from; otherwise empty."""
        return self.json(HF_CONFIG) if (self.folder / HF_CONFIG).is_file() else {}

    def check_tensors(self, config: DecoderConfig, kinds: tuple[str, ...] = ("model/",)) -> None:
        """Compares the tensors with the weights of a model. Adapters may be missing.

        Args:
            config: the model.
            kinds: kinds of tensors that are to be loaded, out of "model/" and "optimizer/".

        Raises:
            CheckpointError: if a weight is missing or has another shape, or there is a tensor that the model does not use.
        """
        shapes, trained = stored_shapes(config), parameter_shapes(config)
        names = [name for name in self.manifest.tensors if name.startswith(kinds)]
        weights = {name.removeprefix("model/") for name in names if name.startswith("model/")}
        states = {name for name in names if name.startswith("optimizer/")}
        unused = {f"model/{name}" for name in weights - shapes.keys()}
        unused |= {name for name in states if name.removeprefix("optimizer/").rpartition(".")[0] not in trained}
        missing = {f"model/{name}" for name in shapes.keys() - weights if ADAPTER_INFIX not in name} if weights else set()
        other = {f"model/{n}" for n in weights & shapes.keys() if self.manifest.tensors[f"model/{n}"].shape != list(shapes[n])}
        for found, what in (
            (missing, "does not have the tensor"), (unused, "has a tensor that its model does not use:"),
            (other, "has another shape of the tensor"),
        ):  # fmt: skip
            if found:
                more = f" and {len(found) - 1} more" if len(found) > 1 else ""
                raise CheckpointError(f"{self.folder} {what} {min(found)}{more}: its files are not of the model in model.json")

    def dtype_of(self, name: str) -> torch.dtype:
        """Returns the dtype of a weight on disk."""
        return self._find(f"model/{name}")[1].dtype

    def read(self, name: str, start: int, count: int) -> Tensor:
        """Reads rows of a weight.

        Args:
            name: the weight's name in the model.
            start, count: the first row and the number of rows (see ``storage.tensors``).
        """
        return self._read(f"model/{name}", start, count)

    def byte_range(self, name: str, start: int, count: int) -> ByteRange | None:
        """Returns where rows of a weight are on disk, or None if they are not contiguous in one file."""
        entry, spec = self._find(f"model/{name}")
        for chunk in entry.chunks:
            for row, stored, rows in _row_ranges(chunk, spec):
                full_width = len(entry.shape) == 1 or chunk.sizes[-1] == entry.shape[-1]
                if full_width and row <= start and start + count <= row + rows:
                    return self._file(chunk.file).byte_range(chunk.key, stored + start - row, count)
        return None

    def tensor(self, name: str) -> Tensor:
        """Reads a full tensor and joins its chunks. ``name``: KIND/NAME, for example "model/norm.weight"."""
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
            for row, stored, rows in _row_ranges(chunk, spec):
                a, b = max(start, row), min(start + count, row + rows)
                if b > a:
                    part = self._file(chunk.file).read(chunk.key, stored + a - row, b - a)
                    if part.shape == (count, *spec.row_shape):
                        return part
                    out = torch.empty((count, *spec.row_shape), dtype=spec.dtype) if out is None else out
                    columns = slice(chunk.offsets[-1], chunk.offsets[-1] + chunk.sizes[-1]) if part.dim() > 1 else ...
                    out[a - start : b - start, columns] = part
        assert out is not None, f"{name} has no chunks"
        return out

    def _file(self, name: str) -> TensorFile:
        if name not in self._files:
            self._files[name] = open_file(self.folder / name)
        return self._files[name]


def open_file(path: Path) -> TensorFile:
    """Opens a safetensors file for reading.

    Raises:
        CheckpointError: if it cannot be opened.
    """
    try:
        return TensorFile(path)
    except UsageError as error:
        raise CheckpointError(f"{error}; {instead(path.parent)}") from error


def _row_ranges(chunk: Chunk, spec: Spec) -> Iterator[tuple[int, int, int]]:
    """Divides a chunk into ranges of consecutive rows: one range, or, with three dimensions, one per index of the first.

    Yields:
        (first row in the tensor, first row in the chunk, number of rows).
    """
    if len(chunk.sizes) < 3:
        yield chunk.offsets[0], 0, chunk.sizes[0]
        return
    outer, rows = chunk.sizes[0], chunk.sizes[1]
    for n in range(outer):
        yield (chunk.offsets[0] + n) * spec.shape[1] + chunk.offsets[1], n * rows, rows


def _dtype(entry: TensorEntry) -> torch.dtype:
    dtype = getattr(torch, entry.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"the manifest has the dtype {entry.dtype!r}, which PyTorch does not have")
    return dtype


def complete_checkpoints(run: Path) -> list[Path]:
    """Returns the complete checkpoints and snapshots of a run folder, the newest step first: that in the manifest."""
    return list(_runs_of_checkpoints(run))


def checkpoints_of_one_run(run: Path) -> list[Path]:
    """Returns the same.

    Raises:
        UsageError: if the checkpoints are of several runs.
    """
    found = _runs_of_checkpoints(run)
    by_run: dict[str, list[str]] = defaultdict(list)
    for folder, identity in found.items():
        if identity is not None:  # whoever loads a damaged one says that it is damaged
            by_run[identity].append(folder.relative_to(run).as_posix())
    if len(by_run) > 1:
        lines = "\n".join(f"  {', '.join(names)}" for names in by_run.values())
        raise UsageError(
            f"{run} contains checkpoints of several runs, one run per line:\n{lines}\nLeave those of one run there, and "
            "move the others to another folder; nothing has been changed"
        )
    return list(found)


def _runs_of_checkpoints(run: Path) -> dict[Path, str | None]:
    """Returns complete checkpoint or snapshot -> identity of its run (None if the manifest is damaged), the newest first."""
    found: dict[Path, tuple[int, str | None]] = {}
    for parent in (CHECKPOINTS, SNAPSHOTS):
        for name, folder in find_folders(run / parent, NAMES[parent]).items():
            if (read := _step_and_run(folder, name)) is not None:
                found[folder] = read
    newest_first = sorted(found, key=lambda f: (found[f][0], f.parent.name), reverse=True)
    return {folder: found[folder][1] for folder in newest_first}


def remove_leftovers(run: Path) -> None:
    """Removes what killed saves and exports have left in a run folder. No other process may be writing to it."""
    for parent, names in NAMES.items():
        clean_up(run / parent, names)


def _step_and_run(folder: Path, name: str) -> tuple[int, str | None] | None:
    """Returns the step of a checkpoint and the identity of its run, or None if it is not complete."""
    if not (folder / NAME).is_file():
        return None
    try:
        return Head.read(folder)
    except CheckpointError:
        # A damaged snapshot is not used. A damaged checkpoint keeps its place, so that it is not passed over in silence.
        return (int(name.removeprefix("step-")), None) if name.startswith("step-") else None


def saved_checkpoints(run: Path, identity: str) -> dict[int, Path]:
    """Returns step -> folder of the checkpoints that a run has saved to a run folder and nobody has renamed, in order."""
    found = {}
    for folder in (run / CHECKPOINTS).glob("step-*"):
        try:
            step, of = Head.read(folder)
        except CheckpointError:
            continue
        if of == identity and folder.name == checkpoint_name(step):
            found[step] = folder
    return dict(sorted(found.items()))


def find_checkpoint(path: Path) -> Path:
    """Returns ``path`` if it is a checkpoint, or the newest checkpoint if it is a run folder.

    Raises:
        CheckpointError: if it is neither.
        UsageError: if it is a folder with checkpoints of several runs.
    """
    if (path / NAME).is_file():
        return path
    if found := checkpoints_of_one_run(path):
        return found[0]
    raise CheckpointError(f"{path} is neither a complete checkpoint (it has no {NAME}) nor a run folder with one")
