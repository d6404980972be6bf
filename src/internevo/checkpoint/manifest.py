"""``manifest.json``: every file's size and checksums, and where each part of each tensor is. Written last."""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..storage.jsonfile import to_json

NAME = "manifest.json"
FORMAT = 2
BLOCK = 4 << 20
"""Bytes of a file under one CRC, so that damage can be located."""


@dataclass
class FileEntry:
    """One file of a checkpoint."""

    size: int
    crc32: list[int]
    """Of each block of ``BLOCK`` bytes."""


@dataclass
class Chunk:
    """A box of a tensor: where it lies in the tensor, and where it is stored."""

    file: str
    key: str
    offsets: list[int]
    sizes: list[int]


@dataclass
class TensorEntry:
    """A tensor in full."""

    dtype: str
    shape: list[int]
    chunks: list[Chunk]


@dataclass
class Manifest:
    """The whole checkpoint."""

    step: int
    layout: dict[str, int]
    versions: dict[str, str]
    files: dict[str, FileEntry] = field(default_factory=dict)
    tensors: dict[str, TensorEntry] = field(default_factory=dict)
    format: int = FORMAT

    def write(self, folder: Path) -> None:
        """Writes the manifest so that it is either whole or not there."""
        temporary = folder / (NAME + ".tmp")
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(to_json(asdict(self)))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(folder / NAME)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Reads ``folder/manifest.json``.

        Raises:
            CheckpointError: when it is not there or cannot be read.
        """
        path = folder / NAME
        if not path.is_file():
            raise CheckpointError(f"{folder} is not a complete checkpoint: it has no {NAME}")
        try:
            values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if values["format"] != FORMAT:
                raise CheckpointError(f"{path} has format {values['format']}, and this version reads {FORMAT}")
            files = {n: FileEntry(**f) for n, f in values["files"].items()}
            tensors = {
                n: TensorEntry(t["dtype"], t["shape"], [Chunk(**c) for c in t["chunks"]]) for n, t in values["tensors"].items()
            }
            return cls(values["step"], values["layout"], values["versions"], files, tensors)
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is damaged: {error}") from error


class Checksums:
    """Size and checksums of a file whose bytes come in pieces."""

    def __init__(self) -> None:
        self._size, self._crc32, self._running = 0, list[int](), 0

    def update(self, data: bytes | memoryview) -> None:
        """The next bytes of the file."""
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
        """What the manifest says of the file."""
        rest = [self._running] if self._size % BLOCK else []
        return FileEntry(self._size, self._crc32 + rest)


def describe_file(path: Path) -> FileEntry:
    """Size and checksums of a file, read once."""
    sums = Checksums()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            sums.update(block)
    return sums.entry()


def verify(folder: Path, names: list[str], manifest: Manifest) -> None:
    """Compares files with the manifest.

    Raises:
        CheckpointError: naming the file, and where in it the damage is.
    """
    for name in names:
        path, wanted = folder / name, manifest.files[name]
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: the checkpoint is incomplete; use an earlier one")
        if path.stat().st_size != wanted.size:
            raise CheckpointError(
                f"{path} has {path.stat().st_size} bytes, and the manifest says {wanted.size}; use an earlier one"
            )
        found = describe_file(path)
        block = next((n for n, (a, b) in enumerate(zip(found.crc32, wanted.crc32, strict=True)) if a != b), None)
        if block is not None:
            place = f"bytes {block * BLOCK} to {min((block + 1) * BLOCK, wanted.size)}"
            raise CheckpointError(f"{path} is damaged: its checksum differs in {place}; use an earlier checkpoint")
