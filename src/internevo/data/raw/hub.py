"""The files of a dataset in the Hugging Face layout: a folder, or a name on the hub.

https://huggingface.co/docs/datasets/repository_structure
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from ...errors import DataError, UsageError
from .inputs import find_files

WORDS = {"train": "train|training", "valid": "validation|valid|val|dev", "test": "test|testing|eval|evaluation"}
"""What the name of a split's files or folders says."""
NOT_DATA = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")


def dataset_files(name: str, subset: str | None, split: str) -> tuple[Path, list[tuple[str, Path]]]:
    """The folder of a dataset, and (kind, path) of the files of a split.

    Files that are named for the split are taken, or else those that are named for no other; of these, those in the folder
    "data" if it has some: some datasets hold their rows as text beside it.

    Args:
        name: a folder, or a dataset on the hub (owner/name), which is downloaded into the hub's cache.
        subset: the folder in it that holds the wanted part.

    Raises:
        DataError: when there are none, or of several kinds.
    """
    root = Path(name) if Path(name).exists() else _download(name)
    root = root / subset if subset else root
    if not root.exists():
        raise DataError(f"{root} does not exist (data.subset_name)")
    try:
        found = [file for file in find_files([root], None, None, ()) if file[1].name not in NOT_DATA]
    except UsageError as error:
        raise DataError(str(error)) from error
    splits = [_split(str(path.relative_to(root))) if path != root else None for _, path in found]
    mine = [file for file, of in zip(found, splits, strict=True) if of == split]
    mine = mine or [file for file, of in zip(found, splits, strict=True) if of is None]
    if not mine:
        raise DataError(f"{root} holds no files for {split} (it has {', '.join(sorted({of for of in splits if of}))})")
    mine = [file for file in mine if root / "data" in file[1].parents] or mine
    kinds = Counter(kind for kind, _ in mine)
    if len(kinds) > 1:
        counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        raise DataError(
            f"{root} holds files of several kinds for {split} ({counts}), perhaps the same rows twice: name a folder in it "
            "with data.subset_name, or mix the files with data.mixture"
        )
    return (root if root.is_dir() else root.parent), mine


def _split(path: str) -> str | None:
    """Which split a path names, its last such word deciding."""
    found = [
        (match.start(), split)
        for split, words in WORDS.items()
        for match in re.finditer(rf"(?<![a-zA-Z])(?:{words})(?![a-zA-Z])", path.lower())
    ]
    return max(found)[1] if found else None


def _download(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise UsageError(
            f"{name} is no folder, and to look for it on the Hugging Face hub: pip install huggingface_hub"
        ) from error
    try:
        return Path(snapshot_download(name, repo_type="dataset"))
    except Exception as error:  # the library raises many kinds
        raise DataError(f"{name} is no folder, and cannot be had from the Hugging Face hub: {error}") from error
