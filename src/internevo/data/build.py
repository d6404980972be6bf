"""Builds the training source and the validation rows that a config describes."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

from ..config.data import STREAMS, Data, MixturePart, name_of
from ..errors import ConfigError, DataError
from ..text.tokenizer import Tokenizer
from .encoding.encode import Encoder, EncoderPool, cached_tokenizer
from .mixture import Mixture, Part
from .raw.hub import dataset_files
from .rows import InMemoryRows, PackedRows, PaddedRows, RandomRows, ReadableRows, Rows, WholeRows
from .source import ShuffledRows, SingleSource, Source
from .streaming.blocks import BlockReader, make_shards
from .streaming.exchange import Exchange
from .streaming.stream import Stream, all_rows
from .tokenized.index import dataset_type, minimum_length, open_index

MIN_VALID_LENGTH = 1
"""The minimum length of validation documents: all are used, whatever ``data.min_length`` is."""


def train_source(
    data: Data,
    vocab_size: int,
    new_exchange: Callable[[], Exchange] = Exchange,
    local_world_size: int = 1,
    reports: bool = True,
) -> Source:
    """Builds the source of a training run. Without a folder, and for ``data.type = "mocked"``, rows are random.

    Args:
        new_exchange: returns a new ``Exchange`` for each stream; it is called on every rank, in the same order.
        local_world_size: the number of processes of the run that share the CPU cores of this machine.
        reports: this rank reports rows of tokenized data that are skipped (see ``ShuffledRows``).
    """
    if data.mixture:
        parts = [
            Part(
                name_of(part),
                _source(_part_data(data, part), vocab_size, new_exchange, local_world_size, reports, part.epochs),
                part.weight,
            )
            for part in data.mixture
        ]
        return Mixture(parts)
    return _source(data, vocab_size, new_exchange, local_world_size, reports, None)


def parts_of(data: Data) -> list[Data]:
    """Returns the data section of each part of a mixture; that of data which is none is its only part."""
    return [_part_data(data, part) for part in data.mixture or ()] or [data]


def _part_data(data: Data, part: MixturePart) -> Data:
    """Returns the data section for one part of a mixture. What the part does not set is as in ``data``."""
    given = {k: v for k in ("content_name", "subset_name", "format") if (v := getattr(part, k)) is not None}
    return data.model_copy(update={"type": part.kind, "train_folder": part.folder, "mixture": None, **given})


def _source(
    data: Data,
    vocab_size: int,
    new_exchange: Callable[[], Exchange],
    local_world_size: int,
    reports: bool,
    epochs: float | None,
) -> SingleSource:
    folder, _ = data.folders
    if folder is not None and data.type in STREAMS:
        whole_epochs = None if epochs is None else int(epochs)
        return _stream(data, folder, "train", vocab_size, new_exchange(), local_world_size, whole_epochs)
    rows: Rows
    if folder is None:
        rows = RandomRows(data.seq_len, vocab_size, data.seed, data.fixed_random_dataset_seqlen)
    else:
        rows = _rows(data, folder, vocab_size, data.min_length, data.min_length_dict)
    return ShuffledRows(rows, data.seed, data.on_error == "skip", epochs, reports)


def valid_rows(
    data: Data,
    vocab_size: int,
    new_exchange: Callable[[], Exchange] = Exchange,
    local_world_size: int = 1,
    report: Callable[[str], None] | None = None,
) -> Rows | Stream | None:
    """Builds the validation rows: those of ``data.valid_folder``, a few random rows if the training data is random, or None.

    Args:
        report: is called with a message for each row of tokenized data that is skipped. For the others see ``train_source``.
    """
    if not data.valid_every:
        return None
    train_folder, folder = data.folders
    if folder is not None and data.type in STREAMS:
        return _stream(data, folder, "valid", vocab_size, new_exchange(), local_world_size, 1)
    if folder is not None:
        rows = _rows(data, folder, vocab_size, MIN_VALID_LENGTH, None)
        return ReadableRows(rows, report) if data.on_error == "skip" else rows
    if train_folder is None and not data.mixture:
        return RandomRows(data.seq_len, vocab_size, data.seed + 1, data.fixed_random_dataset_seqlen, rows=16)
    return None


def load_stream(
    rows: Rows | Stream | None, limit: int | None, report: Callable[[str], None] = lambda message: None
) -> Rows | None:
    """Reads a stream of validation rows into memory, to its end or up to ``limit`` rows. Other rows are returned as they are.

    Every rank must call it, because all ranks read a stream together.

    Args:
        report: is called with a message for each document that this rank has skipped.
    """
    if isinstance(rows, Stream):
        found = list(all_rows(rows, limit, report))
        if not found:
            raise DataError("the validation data (data.valid_folder) contains no document")
        return InMemoryRows(found, rows.types, rows.seq_len)
    return rows


def _rows(data: Data, folder: str, vocab_size: int, min_length: int, min_lengths: dict[str, int] | None) -> Rows:
    index = open_index(Path(folder), min_length, min_lengths)
    if not index.tokens:
        shorter = f", or only documents with fewer than data.min_length = {min_length} tokens" if min_length > 1 else ""
        raise DataError(f"{folder} contains no document{shorter}: tokenize more text, or name another folder")
    if not data.use_packed_dataset:
        return PaddedRows(index, data.seq_len, vocab_size)
    packed = PackedRows if data.split_documents else WholeRows
    return packed(index, data.seq_len, vocab_size, into_one=data.pack_sample_into_one)


def checked_tokenizer(path: str, vocab_size: int) -> Tokenizer:
    """Loads the tokenizer of ``data.tokenizer_path``.

    Raises:
        ConfigError: if its vocabulary is larger than the model's.
    """
    found = cached_tokenizer(Path(path).resolve())
    if not found.fits(vocab_size):
        raise ConfigError(
            f"model.vocab_size = {vocab_size} is smaller than the vocabulary of data.tokenizer_path = {path!r}, which has "
            f"{found.vocab_size} entries"
        )
    return found


def _is_trained_on(data: Data, name: str) -> bool:
    """Whether the training data is read from the same folder. Two subsets of one dataset have no file in common."""
    return any(
        Path(folder).resolve() == Path(name).resolve()
        and (source.subset_name == data.subset_name or not source.subset_name or not data.subset_name)
        for source in parts_of(data)
        if (folder := source.folders[0])
    )


def _stream(
    data: Data, name: str, split: str, vocab_size: int, exchange: Exchange, local_world_size: int, epochs: int | None
) -> Stream:
    assert data.tokenizer_path is not None
    tokenizer = Path(data.tokenizer_path).resolve()
    checked_tokenizer(data.tokenizer_path, vocab_size)
    root, files = dataset_files(name, data.subset_name, split, trained_on=_is_trained_on(data, name))
    min_length, min_lengths = (data.min_length, data.min_length_dict) if split == "train" else (MIN_VALID_LENGTH, None)

    def type_and_minimum(file: tuple[str, Path]) -> tuple[str, int]:
        name = file[1].relative_to(root).as_posix()
        return dataset_type(root, name), minimum_length(name, min_length, min_lengths)

    types = sorted({type_and_minimum(file)[0] for file in files})
    shards = [
        shard
        for (type_, minimum), group in groupby(files, type_and_minimum)
        for shard in make_shards(list(group), types.index(type_), minimum)
    ]
    encoder = Encoder(tokenizer, data.format, data.content_name, data.on_error, vocab_size, data.template_date)
    pool = EncoderPool(encoder, min(data.num_worker, max(1, (os.cpu_count() or 1) // local_world_size)))
    blocks = BlockReader(shards, data.seed, pool, exchange, epochs)
    return Stream(blocks, data.seq_len, types, packed=data.use_packed_dataset, into_one=data.pack_sample_into_one)
