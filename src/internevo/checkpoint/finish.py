"""The end of writing a checkpoint: the small files, the manifest, the folder's name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..models.huggingface.tokenizer import copy_tokenizer
from ..storage.folders import put_in_place, sync
from ..storage.jsonfile import write_json
from .manifest import Manifest, describe_file


@dataclass
class Extras:
    """What a checkpoint holds besides tensors: JSON files by name, and a tokenizer."""

    json: dict[str, Any]
    tokenizer: Path | None = None


def complete(temporary: Path, folder: Path, manifest: Manifest, extras: Extras, durable: bool = True) -> None:
    """Adds the small files and the manifest to a folder of tensors, and gives it its name.

    Args:
        durable: waits until everything is on disk, so that not even a power cut leaves a manifest without its files.
    """
    for name, values in extras.json.items():
        write_json(temporary / name, values, indent=1)
    if extras.tokenizer is not None:
        copy_tokenizer(extras.tokenizer, temporary / "tokenizer")
    for path in sorted(temporary.rglob("*")):
        name = path.relative_to(temporary).as_posix()
        if path.is_file() and name not in manifest.files:
            manifest.files[name] = describe_file(path)
    if durable:
        _sync_all(temporary)
    manifest.write(temporary)
    if durable:
        _sync_all(temporary)
    put_in_place(temporary, folder)  # what has that name: a snapshot's turn, or a step saved again after a resume


def _sync_all(folder: Path) -> None:
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)
