"""The last part of writing a checkpoint: the JSON files, the tokenizer, the manifest, and the final name of the folder."""

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
    """What a checkpoint contains besides tensors."""

    json: dict[str, Any]
    """Name of a JSON file -> its content."""
    tokenizer: Path | None = None
    """Path of the tokenizer, if there is one."""


def complete(temporary: Path, folder: Path, manifest: Manifest, extras: Extras) -> None:
    """Finishes a checkpoint whose tensors are on disk, and renames the folder.

    Even after a power cut, a folder with a manifest is complete: whoever writes a file of it waits until the file and its name
    are on disk, since on a network file system no other host can do that. The manifest is written when all have done so.

    Args:
        temporary: the folder with the tensors, under its temporary name.
        folder: the final name. A folder that already has it is replaced.
        manifest: has the tensors and their files; the entries of the other files are added.
    """
    add_files(temporary, manifest, extras)
    manifest.write(temporary)
    sync(temporary)
    put_in_place(temporary, folder)  # may replace an older snapshot, or the same step from before a resume


def add_files(folder: Path, manifest: Manifest, extras: Extras) -> None:
    """Writes the files of a checkpoint that are not tensors, and waits until they are on disk.

    Args:
        manifest: their entries are added. It is not written.
    """
    for name, values in extras.json.items():
        write_json(folder / name, values, indent=1)
    if extras.tokenizer is not None:
        copy_tokenizer(extras.tokenizer, folder / "tokenizer")
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name in manifest.files:
            continue
        sync(path)
        if path.is_file():
            manifest.files[name] = describe_file(path)
    sync(folder)
