"""The training source and the validation rows that a config names."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

from ..config.data import STREAMS, Data, MixturePart, name_of
from ..errors import ConfigError
from ..text.tokenizer import Tokenizer
from .encoding.encode import Encoder, EncoderPool, cached_tokenizer
from .mixture import Mixture, Part
from .raw.hub import dataset_files
from .rows import ListedRows, PackedRows, PaddedRows, RandomRows, Rows
from .source import Shuffled, Source
from .streaming.blocks import Blocks, make_shards
from .streaming.exchange import Exchange
from .streaming.stream import Stream, all_rows
from .tokenized.index import dataset_type, minimum_length, open_index

MIN_VALID_LENGTH = 1


def train_source(data: Data, vocab_size: int, new_exchange: Callable[[], Exchange] = Exchange, ranks_here: int = 1) -> Source:
    """The source of a training run: random rows without a folder, and for ``data.type = "mocked"``.

    Args:
        new_exchange: called for each stream, on every rank.
        ranks_here: processes of the run that share this machine's cores.
    """
    if data.mixture:
        parts = [
            Part(name_of(part), _source(_as_data(data, part), vocab_size, new_exchange, ranks_here, part.epochs), part.weight)
            for part in data.mixture
        ]
        return Mixture(parts)
    return _source(data, vocab_size, new_exchange, ranks_here, None)


def _as_data(data: Data, part: MixturePart) -> Data:
    given = {k: v for k in ("content_name", "subset_name", "format") if (v := getattr(part, k)) is not None}
    return data.model_copy(update={"type": part.kind, "train_folder": part.folder, "mixture": None, **given})


def _source(data: Data, vocab_size: int, new_exchange: Callable[[], Exchange], ranks_here: int, epochs: float | None) -> Source:
    folder, _ = data.folders
    if folder is not None and data.type in STREAMS:
        whole = None if epochs is None else int(epochs)
        return _stream(data, folder, "train", vocab_size, new_exchange(), ranks_here, whole)
    rows: Rows
    if folder is None:
        rows = RandomRows(data.seq_len, vocab_size, data.seed, data.fixed_random_dataset_seqlen)
    else:
        rows = _rows(data, folder, vocab_size, data.min_length, data.min_length_dict)
    return Shuffled(rows, data.seed, data.on_error == "skip", epochs)


def valid_rows(
    data: Data, vocab_size: int, new_exchange: Callable[[], Exchange] = Exchange, ranks_here: int = 1
) -> Rows | Stream | None:
    """Rows of ``data.valid_folder``; a few random ones beside random training data; None when there is nothing to do."""
    if not data.valid_every:
        return None
    train_folder, folder = data.folders
    if folder is not None and data.type in STREAMS:
        return _stream(data, folder, "valid", vocab_size, new_exchange(), ranks_here, 1)
    if folder is not None:
        return _rows(data, folder, vocab_size, MIN_VALID_LENGTH, None)
    if train_folder is None and not data.mixture:
        return RandomRows(data.seq_len, vocab_size, data.seed + 1, data.fixed_random_dataset_seqlen, rows=16)
    return None


def in_memory(rows: Rows | Stream | None, limit: int | None) -> Rows | None:
    """Reads a stream to its end, or up to ``limit`` rows; called on every rank."""
    if isinstance(rows, Stream):
        return ListedRows(list(all_rows(rows, limit)), rows.types, rows.seq_len)
    return rows


def _rows(data: Data, folder: str, vocab_size: int, shortest: int, minimums: dict[str, int] | None) -> Rows:
    index = open_index(Path(folder), shortest, minimums)
    if not data.use_packed_dataset:
        return PaddedRows(index, data.seq_len, vocab_size)
    return PackedRows(index, data.seq_len, vocab_size, into_one=data.pack_sample_into_one)


def fitting_tokenizer(path: str, vocab_size: int) -> Tokenizer:
    """The tokenizer of ``data.tokenizer_path``.

    Raises:
        ConfigError: when it has ids that the model has not.
    """
    found = cached_tokenizer(Path(path).resolve())
    if found.vocab_size > vocab_size:
        raise ConfigError(f"model.vocab_size = {vocab_size} is below the {found.vocab_size} entries of data.tokenizer_path")
    return found


def _stream(
    data: Data, name: str, split: str, vocab_size: int, exchange: Exchange, ranks_here: int, epochs: int | None
) -> Stream:
    assert data.tokenizer_path is not None
    tokenizer = Path(data.tokenizer_path).resolve()
    fitting_tokenizer(data.tokenizer_path, vocab_size)
    root, files = dataset_files(name, data.subset_name, split)
    shortest, minimums = (data.min_length, data.min_length_dict) if split == "train" else (MIN_VALID_LENGTH, None)

    def kind_of(file: tuple[str, Path]) -> tuple[str, int]:
        name = file[1].relative_to(root).as_posix()
        return dataset_type(root, name), minimum_length(name, shortest, minimums)

    types = sorted({kind_of(file)[0] for file in files})
    shards = [
        shard
        for (type_, least), group in groupby(files, kind_of)
        for shard in make_shards(list(group), types.index(type_), least)
    ]
    encoder = Encoder(tokenizer, data.format, data.content_name, data.on_error)
    pool = EncoderPool(encoder, min(data.num_worker, max(1, (os.cpu_count() or 1) // ranks_here)))
    blocks = Blocks(shards, data.seed, pool, exchange, epochs)
    return Stream(blocks, data.seq_len, types, packed=data.use_packed_dataset, into_one=data.pack_sample_into_one)
