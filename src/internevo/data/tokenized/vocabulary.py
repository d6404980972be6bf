"""Checks cheaply, before a run starts, that tokenized data fits the model's vocabulary."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ...errors import DataError
from ...text.tokenizer import FILES, Tokenizer, load_tokenizer
from ..rows import tokens_and_labels
from .files import Ids, TokenFile
from .index import list_files

SAMPLE_FILES = 64
"""The number of files of a dataset that are looked into."""
PIECES, PIECE_IDS = 16, 1 << 14
"""The number of pieces of a file that are looked at, and the number of ids in each. Smaller files are read whole."""
SPLITS = ("train", "valid")
"""The folders into which ``internevo tokenize --valid-ratio`` splits its output; the tokenizer is in the folder above."""


def find_tokenizer(root: Path, above: bool = False) -> Tokenizer | None:
    """Opens the tokenizer that is stored with tokenized data, if there is one.

    Args:
        root: the folder of the data.
        above: also look in the folder above, whatever ``root`` is called.
    """
    folders = [root, *([root.resolve().parent] if above or root.resolve().name in SPLITS else [])]
    return next((found for folder in folders if (found := open_tokenizer(folder)) is not None), None)


def open_tokenizer(path: Path) -> Tokenizer | None:
    """Opens a tokenizer, unless it is a folder without the files that can be read quickly (without transformers)."""
    quick = path.is_file() or any((path / name).is_file() for name in FILES) or any(path.glob("*.tiktoken"))
    return load_tokenizer(path) if quick else None


def check_ids(root: Path, vocab_size: int, advice: str = "(model.vocab_size)") -> None:
    """Looks for ids outside a vocabulary in samples of tokenized data; small datasets are read whole.

    Raises:
        DataError: if there is such an id, or a file is broken. The message names the document.
    """
    home, names = root if root.is_dir() else root.parent, [name for name, *_ in list_files(root)]
    for name in names[:: -(-len(names) // SAMPLE_FILES)]:
        file = TokenFile.open(home / name)
        for start, ids in _samples(file):
            tokens, _ = tokens_and_labels(ids)
            wrong = np.flatnonzero(tokens >= vocab_size)
            if len(wrong):
                offset = start + int(wrong[0]) * file.itemsize
                document = int(np.searchsorted(file.meta[:, 0], offset, side="right")) - 1
                raise DataError(
                    f"{file.path}, document {document}: token id {tokens[wrong[0]]} is outside the vocabulary of {vocab_size} "
                    f"{advice}"
                )


def _samples(file: TokenFile) -> Iterator[tuple[int, Ids]]:
    """Yields (byte offset, signed ids) of pieces of a file: of whole documents, if they are lines of JSON."""
    if file.itemsize:
        ids = file.bytes.view(file.dtype)
        for start in _spread(len(ids), PIECES * PIECE_IDS, PIECE_IDS):
            yield start * file.itemsize, ids[start : start + PIECE_IDS].astype(np.int64)
    else:
        documents = len(file.meta)
        mean = max(int(file.meta[:, 1].sum()) // max(documents, 1), 1)
        for document in _spread(documents, PIECES * PIECE_IDS // mean, 1):
            yield int(file.meta[document, 0]), file.read(document)


def _spread(total: int, limit: int, step: int) -> list[int]:
    """Returns where pieces of ``step`` out of ``total`` begin: all, or evenly spaced ones that have ``limit`` in all."""
    if total <= limit:
        return list(range(0, total, step))
    return np.linspace(0, total - step, max(limit // step, 1)).astype(np.int64).tolist()
