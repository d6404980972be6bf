"""The output folder of ``internevo tokenize``: what is in it, and how new data replaces it.

New data is written to the folder ``.tokenizing`` in the output folder, and is moved to its place at the end. Until then, what
was in the output folder stays as it is. If the command is killed while it moves files, the next one moves the rest.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ...errors import UsageError
from ...storage.folders import sync
from ...storage.jsonfile import read_object, replace_json
from ...storage.lock import FileLock
from ...text.tokenizer import TRAINED, is_trained_here
from ..raw.files import walk_files
from ..tokenized.files import meta_path
from ..tokenized.index import REPLACING, UNFINISHED, WORK, remove_cache
from ..tokenized.origin import NAME as ORIGIN
from ..tokenized.origin import Origin

PART = re.compile(r"part-\d{5}\.bin")
"""The names of the files with ids that the command writes."""
TOKENIZER = [Path(name) for name in TRAINED]
"""The files of a tokenizer that it trains."""


class Output:
    """The output folder of a command."""

    def __init__(self, folder: Path, dataset_type: str, splits: bool) -> None:
        """
        Args:
            splits: training data is in a folder "train", instead of directly in ``folder``.

        Raises:
            UsageError: if ``dataset_type`` is not the name of a folder.
        """
        if Path(dataset_type).name != dataset_type or dataset_type.startswith("."):
            raise UsageError(f"the dataset type {dataset_type!r} must be the name of a folder, such as en (--type)")
        self.folder, self.work, self.new = folder, folder / WORK, folder / WORK / "data"
        """``new`` has the new files, under the paths that they will have in ``folder``."""
        self.targets = {"train": Path("train" if splits else ".", dataset_type), "valid": Path("valid", dataset_type)}
        """The folders of training and of validation data, relative to ``folder``."""

    @contextmanager
    def lock(self, status: Callable[[str], None]) -> Iterator[None]:
        """Makes ``work``, and keeps other commands out of it. At the end it is removed, unless it has progress to resume from.

        Args:
            status: is called with messages for the user.

        Raises:
            UsageError: if another command writes to the folder, or there cannot be such a folder.
        """
        for path in (
            self.folder,
            *(self.folder / part for target in self.targets.values() for part in (target.parent, target)),
        ):
            if path.exists() and not path.is_dir():
                raise UsageError(f"output {path} is a file, and must be a folder: give another --output")
        existed = self.folder.exists()
        self.work.mkdir(parents=True, exist_ok=True)
        with FileLock.acquire(self.work / "lock", status):
            try:
                yield
            finally:
                if not any((self.work / name).exists() for name in (UNFINISHED, REPLACING)):
                    shutil.rmtree(self.work, ignore_errors=True)
                if not existed:
                    with suppress(OSError):  # it is not empty
                        self.folder.rmdir()

    def own_files(self) -> list[Path]:
        """Returns the files in the folder that an earlier command has written, relative to the folder."""
        parts = [part for folder in self._data_folders() for part in sorted(folder.iterdir()) if PART.fullmatch(part.name)]
        parts = [part for part in parts if _meta(part).is_file()]
        files = [file.relative_to(self.folder) for part in parts for file in (part, _meta(part))]
        origin = [Path(ORIGIN)] if Origin.read(self.folder) is not None else []
        return [*files, *origin, *(TOKENIZER if is_trained_here(self.folder) else [])]

    def check(self, overwrite: bool, trains_tokenizer: bool) -> list[Path]:
        """Returns the files that the new data replaces, relative to the folder.

        Raises:
            UsageError: if there are any and ``overwrite`` is false, or if the new data would replace or be mixed with files
                that no such command has written.
        """
        own = self.own_files()
        other = next(self._others(own, trains_tokenizer), None)
        if other is not None:
            raise UsageError(
                f"{other} was not written by `internevo tokenize`, and would be replaced by or mixed with its output: move it, "
                "or give another --output"
            )
        old = [path for path in own if trains_tokenizer or path not in TOKENIZER]
        if old and not overwrite:
            raise UsageError(f"{self.folder} already contains tokenized data ({old[0]}); give --overwrite or another --output")
        for path in old:
            if (self.folder / path).parent.resolve() != self.folder.resolve() / path.parent:
                raise UsageError(f"{self.folder / path} is reached over a link, and is not replaced: give another --output")
        for path in self._target_folders():
            if path.exists() and path.stat().st_dev != self.folder.stat().st_dev:
                raise UsageError(f"{path} is on another file system than {self.folder}: give another --output")
        return old

    def replace(self, old: list[Path], progress: dict[str, Any]) -> None:
        """Moves the new files to their places, and removes the old ones.

        Args:
            old: what ``check`` returned.
            progress: JSON values that ``continue_replacing`` returns.
        """
        new = [path.relative_to(self.new) for path in sorted(self.new.rglob("*")) if path.is_file()]
        for path in new:
            sync(self.new / path)
        lists = {"old": [str(path) for path in old], "new": [str(path) for path in new]}
        replace_json(self.work / REPLACING, {**lists, "progress": progress})
        self.continue_replacing()

    def continue_replacing(self) -> dict[str, Any] | None:
        """Does what is left of ``replace`` if a command was killed in it, and returns its ``progress``; else returns None."""
        if not (self.work / REPLACING).is_file():
            return None
        plan = read_object(self.work / REPLACING)
        for name in set(plan["old"]) - set(plan["new"]):
            path = self.folder / name
            path.unlink(missing_ok=True)
            with suppress(OSError):  # other files are in it
                path.parent.rmdir()
        for name in plan["new"]:
            if (self.new / name).is_file():  # else it has been moved
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(self.new / name, self.folder / name)
        for root in (self.folder, self.folder / "train", self.folder / "valid"):
            remove_cache(root)
        for name in (UNFINISHED, REPLACING):
            (self.work / name).unlink(missing_ok=True)
        return dict(plan["progress"])

    def _target_folders(self) -> list[Path]:
        """Returns the folders that the new data will be in, each after the one that contains it."""
        return [self.folder / path for target in self.targets.values() for path in (target.parent, target)]

    def _data_folders(self) -> list[Path]:
        """Returns the folders that may have data of a command: TYPE, train/TYPE and valid/TYPE."""
        parents = (self.folder, self.folder / "train", self.folder / "valid")
        found = (path for parent in parents if parent.is_dir() for path in sorted(parent.iterdir()))
        return [path for path in found if path.is_dir() and not path.name.startswith(".")]

    def _others(self, own: list[Path], trains_tokenizer: bool) -> Iterator[Path]:
        """Yields files that no such command has written: tokenized data, and files whose names the new files may have."""
        known, folders = {self.folder / path for path in own}, self._data_folders()
        tokenizer = [self.folder / path for path in (TOKENIZER if trains_tokenizer else [Path(ORIGIN)])]
        for path in walk_files(self.folder):
            part = path.parent in folders and PART.fullmatch(path.name.removesuffix(".meta"))
            if path not in known and (part or path in tokenizer or (path.suffix == ".bin" and meta_path(path).is_file())):
                yield path


def _meta(part: Path) -> Path:
    return part.with_name(part.name + ".meta")
