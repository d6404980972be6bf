"""What ``internevo inspect`` says of tokenized data."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np

from ...errors import DataError, UsageError
from ...text.tokenizer import FILES, Tokenizer, load_tokenizer
from ..rows import split_signs
from .files import Ids, TokenFile
from .index import Index, list_files, open_index

BAR = 40
"""Width of the longest bar of the histogram."""
CHUNK = 1 << 24
"""Ids looked at together."""


def describe(root: Path, tokenizer: Path | None, decode: int) -> Iterator[str]:
    """Lines that describe the tokenized data below ``root``.

    Args:
        tokenizer: whose vocabulary must hold every id; by default the one that lies in ``root`` or the folder above.
        decode: show so many documents as text; what is masked stands in ⟦ ⟧.

    Raises:
        DataError: when files are broken (each is named first), or an id is outside the vocabulary.
        UsageError: when documents cannot be decoded because there is no tokenizer.
    """
    yield from _broken(root)
    index = open_index(root)
    yield f"tokenized data {root}: {len(index):,} documents, {index.tokens:,} tokens in {len(index.files):,} files"
    yield from _types(index)
    yield from _lengths(index)
    found = load_tokenizer(tokenizer) if tokenizer else _beside(root)
    yield from _ids(index, found)
    if decode and found is None:
        raise UsageError("--decode needs a tokenizer: give --tokenizer PATH")
    if decode and found:
        yield from _texts(index, found, decode)


def _broken(root: Path) -> Iterator[str]:
    messages, files = [], list_files(root)
    for name, *_ in files:
        try:
            TokenFile.open(root / name)
        except DataError as error:
            messages.append(str(error))
            yield f"broken: {error}"
    if messages:
        raise DataError(f"{len(messages)} of {len(files)} files below {root} are broken")


def _types(index: Index) -> Iterator[str]:
    lengths = index.documents[:, 1]
    for number, name in enumerate(index.types):
        files = [f for f, kind in enumerate(index.file_types) if kind == number]
        chosen = [lengths[index.first[f] : index.first[f + 1]] for f in files]
        yield f"type {name}: {sum(map(len, chosen)):,} documents, {sum(int(c.sum()) for c in chosen):,} tokens"


def _lengths(index: Index) -> Iterator[str]:
    """How many documents have so many tokens, by powers of two."""
    lengths = index.documents[:, 1]
    if not len(lengths):
        return
    yield f"lengths: shortest {lengths.min():,}, mean {lengths.mean():,.1f}, longest {lengths.max():,}"
    counts = np.bincount(np.log2(lengths).astype(np.int64))
    for power in range(int(np.flatnonzero(counts)[0]), len(counts)):
        span = f"{2**power:,}-{2 ** (power + 1) - 1:,}"
        yield f"  {span:>21} {counts[power]:>12,} {'█' * math.ceil(BAR * counts[power] / counts.max())}"


def _beside(root: Path) -> Tokenizer | None:
    folders = (root, root.resolve().parent)
    return next((load_tokenizer(folder) for folder in folders if any((folder / n).is_file() for n in FILES)), None)


def _ids(index: Index, tokenizer: Tokenizer | None) -> Iterator[str]:
    largest, where = -1, ""
    for number, name in enumerate(index.files):
        file = index.file(number)
        mine = max((int(split_signs(ids)[0].max(initial=-1)) for ids in _all(file)), default=-1)
        largest, where = max((largest, where), (mine, name))
    bits = max(largest, 0).bit_length()
    yield f"intact: every document can be read; the largest id is {largest:,} ({bits} bits), in {where}"
    if tokenizer is None:
        return
    if largest >= tokenizer.vocab_size:
        raise DataError(
            f"{index.root / where} has token id {largest:,}, outside the vocabulary of {tokenizer.vocab_size:,} "
            f"({tokenizer.path})"
        )
    yield f"vocabulary: {tokenizer.vocab_size:,} entries ({tokenizer.path}); every id is inside"


def _all(file: TokenFile) -> Iterator[Ids]:
    """All ids of a file, in pieces."""
    if not file.itemsize:
        yield from (file.read(document) for document in range(len(file.meta)))
        return
    ids = file.bytes.view(file.dtype)
    for start in range(0, len(ids), CHUNK):
        yield ids[start : start + CHUNK].astype(np.int64)


def _texts(index: Index, tokenizer: Tokenizer, count: int) -> Iterator[str]:
    for document in range(min(count, len(index))):
        tokens, labels = split_signs(index.read(document))
        masked = labels < 0
        borders = [0, *(np.flatnonzero(np.diff(masked)) + 1).tolist(), len(tokens)]
        text = ""
        for a, b in pairwise(borders):
            part = tokenizer.decode(tokens[a:b].tolist())
            text += f"⟦{part}⟧" if masked[a] else part
        note = f", {int(masked.sum()):,} of them masked" if masked.any() else ""
        yield f"--- {index.name(document)}: {len(tokens):,} tokens{note}"
        yield text
