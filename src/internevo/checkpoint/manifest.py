"""``manifest.json``: the size and the checksums of every file, and where each chunk of each tensor is. It is written last."""

from __future__ import annotations

import itertools
import json
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..storage.jsonfile import replace_json

NAME = "manifest.json"
FORMAT = 2
BLOCK = 4 << 20
"""Each checksum is of this many bytes of a file, so that damage can be located."""


@dataclass
class FileEntry:
    """A file of a checkpoint."""

    size: int
    """Bytes."""
    crc32: list[int]
    """The CRC-32 of each ``BLOCK`` bytes."""


@dataclass
class Chunk:
    """A rectangular part of a tensor that is stored as one safetensors tensor (``ChunkStorageMetadata`` in PyTorch)."""

    file: str
    """Name of its file in the checkpoint."""
    key: str
    """Its name in that file."""
    offsets: list[int]
    """Index of its first element in the tensor, along every dimension."""
    sizes: list[int]
    """Its shape."""


@dataclass
class TensorEntry:
    """A full tensor, and its chunks."""

    dtype: str
    shape: list[int]
    chunks: list[Chunk]


@dataclass
class Manifest:
    """The content of a checkpoint."""

    step: int
    layout: dict[str, int]
    """Axis -> size, of the run that saved the checkpoint."""
    versions: dict[str, str]
    """Package -> version, of the run that saved the checkpoint."""
    files: dict[str, FileEntry] = field(default_factory=dict)
    """Name in the folder -> file."""
    tensors: dict[str, TensorEntry] = field(default_factory=dict)
    """KIND/NAME -> tensor."""
    run: str = ""
    """The identity of the run that saved the checkpoint; empty if it was converted, or saved before runs had one."""
    format: int = FORMAT

    def write(self, folder: Path) -> None:
        """Writes ``folder/manifest.json`` atomically."""
        replace_json(folder / NAME, asdict(self))

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Reads ``folder/manifest.json``.

        Raises:
            CheckpointError: if it is missing, damaged, or has another format.
        """
        path = folder / NAME
        if not path.is_file():
            raise CheckpointError(f"{folder} is not a complete checkpoint: it has no {NAME}")
        try:
            values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if values["format"] != FORMAT:
                raise CheckpointError(f"{path} has format {values['format']}, and this version of internevo reads {FORMAT}")
            files = {n: FileEntry(**f) for n, f in values["files"].items()}
            tensors = {
                n: TensorEntry(t["dtype"], t["shape"], [Chunk(**c) for c in t["chunks"]]) for n, t in values["tensors"].items()
            }
            run = values.get("run", "")
            return cls(values["step"], values["layout"], values["versions"], files, tensors, run)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} is damaged: {error}") from error


class Checksums:
    """Computes the size and the checksums of a file from its bytes, which may come in pieces."""

    def __init__(self) -> None:
        self._size, self._crc32, self._running = 0, list[int](), 0

    def update(self, data: bytes | memoryview) -> None:
        """Adds the next bytes of the file."""
        view = memoryview(data)
        while len(view):
            part = view[: BLOCK - self._size % BLOCK]
            self._running = zlib.crc32(part, self._running)
            self._size += len(part)
            if self._size % BLOCK == 0:
                self._crc32.append(self._running)
                self._running = 0
            view = view[len(part) :]

    def entry(self) -> FileEntry:
        """Returns the entry of the file for the manifest."""
        rest = [self._running] if self._size % BLOCK else []
        return FileEntry(self._size, self._crc32 + rest)


def describe_file(path: Path) -> FileEntry:
    """Reads a file once, and returns its size and checksums."""
    sums = Checksums()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            sums.update(block)
    return sums.entry()


def verify(folder: Path, names: list[str], manifest: Manifest) -> None:
    """Compares the files ``names`` of a checkpoint with its manifest.

    Raises:
        CheckpointError: if a file is missing or damaged. The message has its name, and which of its bytes are damaged.
    """
    for name in names:
        path, expected = folder / name, manifest.files[name]
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: the checkpoint is incomplete; use an earlier checkpoint")
        if path.stat().st_size != expected.size:
            raise CheckpointError(
                f"{path} has {path.stat().st_size} bytes, and the manifest says {expected.size}; use an earlier checkpoint"
            )
        found = describe_file(path)
        block = next((n for n, (a, b) in enumerate(itertools.zip_longest(found.crc32, expected.crc32)) if a != b), None)
        if block is not None:
            damage = f"bytes {block * BLOCK} to {min((block + 1) * BLOCK, expected.size)}"
            raise CheckpointError(f"{path} is damaged: its checksum differs in {damage}; use an earlier checkpoint")
