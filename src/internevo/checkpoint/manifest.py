"""``manifest.json``: the size and the checksums of every file, and where each chunk of each tensor is. It is written last."""

from __future__ import annotations

import gc
import itertools
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import CheckpointError
from ..storage.jsonfile import finite_json
from ..storage.replace import replace_pieces
from ..wording import counted

NAME = "manifest.json"
CHECKPOINTS = "checkpoints"
"""The folder of the checkpoints in a run folder."""
FORMAT = 2
HEAD_BYTES = 1 << 16
"""The head of a manifest, which is everything before its files, has fewer bytes."""
AFTER_HEAD, END = ', "files": {', "}\n"
"""The text after the head, and at the end of a manifest."""
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


class Head(NamedTuple):
    """What identifies a checkpoint. It can be read alone: the manifest of a large run has more than 100 MB."""

    step: int
    run: str

    @classmethod
    def read(cls, folder: Path) -> Head:
        """Reads the head of ``folder/manifest.json``, and its end, which a truncated one does not have.

        Raises:
            CheckpointError: as ``Manifest.read``. Damage between the head and the end is not found.
        """
        with suppress(OSError, ValueError, KeyError), open(folder / NAME, "rb") as file:
            head = file.read(HEAD_BYTES).partition(AFTER_HEAD.encode())[0]
            file.seek(-len(END), os.SEEK_END)
            values = json.loads(head + b"}")
            if values["format"] == FORMAT and file.read() == END.encode():
                return cls.of(values)
        whole = Manifest.read(folder)  # an older version has written it in another order, or it is damaged
        return cls(whole.step, whole.run)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Head:
        """Takes the head from the values of a manifest.

        Raises:
            KeyError, ValueError: if they are damaged.
        """
        step, run = values["step"], values.get("run", "")
        if type(step) is not int or step < 0 or not isinstance(run, str):
            raise ValueError(f"step = {step!r} or run = {run!r} is of a wrong type")
        return cls(step, run)


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
        replace_pieces(folder / NAME, self._json())

    def _json(self) -> Iterator[str]:
        """Yields the text of the file in short pieces, since no other thread runs while one of them is made."""
        head = {"format": FORMAT, "step": self.step, "run": self.run, "layout": self.layout, "versions": self.versions}
        yield finite_json(head)[:-1] + AFTER_HEAD
        yield from _entries(self.files)
        yield '}, "tensors": {'
        yield from _entries(self.tensors)
        yield "}" + END

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Reads ``folder/manifest.json``.

        Raises:
            CheckpointError: if it is missing, damaged, or has another format.
        """
        path = folder / NAME
        if not path.is_file():
            raise CheckpointError(f"{folder} is not a complete checkpoint: it has no {NAME}")
        with _without_garbage_collection():
            return cls._read(path)

    @classmethod
    def _read(cls, path: Path) -> Manifest:
        try:
            values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if values["format"] != FORMAT:
                raise CheckpointError(f"{path} has format {values['format']}, and this version of internevo reads {FORMAT}")
            files = {n: FileEntry(**f) for n, f in values["files"].items()}
            tensors = {
                n: TensorEntry(t["dtype"], t["shape"], [Chunk(**c) for c in t["chunks"]]) for n, t in values["tensors"].items()
            }
            step, run = Head.of(values)
            return cls(step, values["layout"], values["versions"], files, tensors, run)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} is damaged: {error}; {instead(path.parent)}") from error


def _entries(entries: Mapping[str, FileEntry | TensorEntry]) -> Iterator[str]:
    """Yields the items of a JSON object."""
    separator = ""
    for name, entry in entries.items():
        yield f"{separator}{finite_json(name)}: {finite_json(entry)}"
        separator = ", "


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """While millions of objects are made that all stay, the collector would search them again and again, most of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


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


def instead(folder: Path) -> str:
    """Says what to do without a checkpoint that is damaged."""
    if folder.parent.name != CHECKPOINTS:
        return "use another copy of it, or another checkpoint"
    earlier = [f for f in folder.parent.glob("step-*") if f.name < folder.name and (f / NAME).is_file()]
    if not earlier:
        return f"there is no earlier checkpoint in {folder.parent}; move {folder.name} to another place to start again"
    newest = max(earlier)
    snapshot = " or a later snapshot" if any(folder.parent.parent.glob(f"snapshots/*/{NAME}")) else ""
    return (
        f"move {folder} to another place, and the same command goes on from {newest.name}{snapshot}; or start a run in another "
        f"folder (ckpt.save_ckpt_folder) from there (ckpt.load_ckpt_info.path={newest})"
    )


def verify(folder: Path, names: list[str], manifest: Manifest) -> None:
    """Compares the files ``names`` of a checkpoint with its manifest.

    Raises:
        CheckpointError: if a file is missing or damaged. The message has its name, and which of its bytes are damaged.
    """
    for name in names:
        path, expected = folder / name, manifest.files[name]
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: the checkpoint is incomplete; {instead(folder)}")
        if path.stat().st_size != expected.size:
            raise CheckpointError(
                f"{path} has {counted(path.stat().st_size, 'byte')}, and the manifest says {expected.size}; {instead(folder)}"
            )
        found = describe_file(path)
        block = next((n for n, (a, b) in enumerate(itertools.zip_longest(found.crc32, expected.crc32)) if a != b), None)
        if block is not None:
            damage = f"bytes {block * BLOCK} to {min((block + 1) * BLOCK, expected.size)}"
            raise CheckpointError(f"{path} is damaged: its checksum differs in {damage}; {instead(folder)}")
