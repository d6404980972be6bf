"""The end of writing a checkpoint: the small files, the manifest, the folder's name."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..models.huggingface.folder import copy_tokenizer
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
        (temporary / name).write_text(json.dumps(values, indent=1), encoding="utf-8")
    if extras.tokenizer is not None:
        copy_tokenizer(extras.tokenizer, temporary / "tokenizer")
    for path in sorted(temporary.rglob("*")):
        name = path.relative_to(temporary).as_posix()
        if path.is_file() and name not in manifest.files:
            manifest.files[name] = describe_file(path)
    sync = _sync if durable else lambda folder: None
    sync(temporary)
    manifest.write(temporary)
    sync(temporary)
    if folder.exists():  # a snapshot's turn, or a step saved again after a resume
        old = folder.with_name(folder.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
        temporary.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    else:
        temporary.rename(folder)
    sync(folder.parent)


def _sync(folder: Path) -> None:
    """Makes sure that files and names are on disk before what depends on them."""
    for path in [*(p for p in folder.glob("*") if p.is_file()), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # some network file systems refuse it for folders
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
