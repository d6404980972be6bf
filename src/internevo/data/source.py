"""The training and validation rows that a config names."""

from __future__ import annotations

from pathlib import Path

from ..config.data import Data
from .index import open_index
from .rows import PackedRows, PaddedRows, RandomRows, Rows

MIN_VALID_LENGTH = 1


def train_rows(data: Data, vocab_size: int) -> Rows:
    """Rows of ``data.train_folder``; random ones without it, and for ``data.type = "mocked"``."""
    folder, _ = data.folders
    if folder is None:
        return RandomRows(data.seq_len, vocab_size, data.seed, data.fixed_random_dataset_seqlen)
    return _rows(data, folder, vocab_size, data.min_length, data.min_length_dict)


def valid_rows(data: Data, vocab_size: int) -> Rows | None:
    """Rows of ``data.valid_folder``; a few random ones beside random training data; None when there is nothing to do."""
    if not data.valid_every:
        return None
    train_folder, folder = data.folders
    if folder is not None:
        return _rows(data, folder, vocab_size, MIN_VALID_LENGTH, None)
    if train_folder is None:
        return RandomRows(data.seq_len, vocab_size, data.seed + 1, data.fixed_random_dataset_seqlen, rows=16)
    return None


def _rows(data: Data, folder: str, vocab_size: int, minimum: int, minimums: dict[str, int] | None) -> Rows:
    index = open_index(Path(folder), minimum, minimums)
    if not data.use_packed_dataset:
        return PaddedRows(index, data.seq_len, vocab_size)
    return PackedRows(index, data.seq_len, vocab_size, into_one=data.pack_sample_into_one)
