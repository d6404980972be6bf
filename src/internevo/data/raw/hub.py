"""Finds the files of a dataset in the Hugging Face layout, in a folder or on the hub.

The layout: https://huggingface.co/docs/datasets/repository_structure
"""

from __future__ import annotations

import glob
import re
from collections import Counter
from pathlib import Path, PurePosixPath

from ...config.hub import may_be_on_hub
from ...errors import DataError, UsageError
from ...storage.hub import download
from .files import COMPRESSED
from .inputs import SUFFIXES, find_files, suffix_kind

SPLIT_WORDS = {"train": "train|training", "valid": "validation|valid|val|dev", "test": "test|testing|eval|evaluation"}
"""For each split, the words (as a regular expression) by which files or folders are known to be part of it."""
METADATA_FILES = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")


def dataset_files(name: str, subset: str | None, split: str, trained_on: bool = False) -> tuple[Path, list[tuple[str, Path]]]:
    """Returns the folder of a dataset, and (kind, path) of each file of a split.

    These are the files whose path contains the split's name or, if there are none, the files whose path contains the name of no
    split; but of a dataset that is also trained on, those are training data, and no other split's. If some of them are in the
    folder "data", only those are used, because some datasets also have the same rows as text next to it.

    Args:
        name: a folder, or the name of a dataset on the hub (owner/name), which is downloaded into the hub's cache.
        subset: a folder inside the dataset; only the files in it are used.
        split: "train", "valid" or "test".
        trained_on: whether the same dataset is trained on, so that another split needs files of its own.

    Raises:
        UsageError: if there is no such folder, and no such dataset on the hub; or ``subset`` is outside of it.
        DataError: if there are no such files, or files of several kinds (see ``inputs.SUFFIXES``).
    """
    subset = _inside(subset)
    root = download(name, "dataset", _patterns(subset)) if may_be_on_hub(name) else Path(name)
    if not root.exists():
        raise UsageError(f"{name} does not exist, and is no name of a dataset on the Hugging Face Hub (owner/name)")
    root = root / subset if subset else root
    if not root.exists():
        raise DataError(f"{root} does not exist (see data.subset_name)")
    try:
        found = [file for file in find_files([root], None, None, ()) if file[1].name not in METADATA_FILES]
    except UsageError as error:
        raise DataError(str(error)) from error
    splits = [_split(str(path.relative_to(root))) if path != root else None for _, path in found]
    chosen = [file for file, file_split in zip(found, splits, strict=True) if file_split == split]
    if split == "train" or not trained_on:
        chosen = chosen or [file for file, file_split in zip(found, splits, strict=True) if file_split is None]
    if not chosen:
        others = sorted({name or "train, since their paths name no split" for name in splits})
        advice = "; name another data.valid_folder, or set data.valid_every=0" if trained_on and split == "valid" else ""
        raise DataError(f"{root} has no files for the split {split} (it has files for: {', '.join(others)}){advice}")
    chosen = [file for file in chosen if root / "data" in file[1].parents] or chosen
    kinds = Counter(suffix_kind(path) for _, path in chosen)  # of files named .json, some may have JSON lines and others not
    if len(kinds) > 1:
        counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        raise DataError(
            f"{root} has files of several formats for the split {split} ({counts}), which may be the same rows twice: choose a "
            "folder in it with data.subset_name, or list the files in data.mixture"
        )
    return (root if root.is_dir() else root.parent), chosen


def _inside(subset: str | None) -> str | None:
    """Returns the folder of a subset in the one form that the hub's files have; None for the whole dataset."""
    path = PurePosixPath(subset or ".")
    if path.is_absolute() or ".." in path.parts:
        raise UsageError(f"the subset {subset!r} is not a folder inside the dataset (see data.subset_name)")
    return None if path == PurePosixPath(".") else path.as_posix()


def _patterns(subset: str | None) -> tuple[str, ...]:
    """Returns patterns of the files that can be read; a dataset may also have images, archives and weights."""
    suffixes, folder = [suffix for kind in SUFFIXES.values() for suffix in kind], f"{glob.escape(subset)}/" if subset else ""
    return tuple(f"{folder}*{s}{end}" for s in suffixes for end in ("", *COMPRESSED))


def _split(path: str) -> str | None:
    """Returns the split that a path names, or None. If there are several such words, the last one decides."""
    found = [
        (match.start(), split)
        for split, words in SPLIT_WORDS.items()
        for match in re.finditer(rf"(?<![a-zA-Z])(?:{words})(?![a-zA-Z])", path.lower())
    ]
    return max(found)[1] if found else None
