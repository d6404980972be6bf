"""Describes tokenized data, for ``internevo inspect``."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np

from ...errors import DataError, UsageError
from ...text.tokenizer import Tokenizer, load_tokenizer
from ...wording import counted
from ..rows import tokens_and_labels
from .files import Ids, TokenFile
from .index import Index, list_files, open_index
from .origin import find_origin
from .vocabulary import find_tokenizer

BAR = 40
"""The width of the longest bar of the histogram, in characters."""
IDS_AT_ONCE = 1 << 24
"""The number of ids that are checked at once."""


def describe_dataset(root: Path, tokenizer: Path | None, decode: int) -> Iterator[str]:
    """Yields lines of text that describe the tokenized data below ``root``.

    Args:
        root: a folder; or the path of one ``.bin`` file without its suffix.
        tokenizer: every id must be in its vocabulary. None: the tokenizer in ``root`` or the folder above it, or else the one
            with which the data was tokenized, if it is still there.
        decode: the number of documents to show as text, with masked tokens in ⟦ ⟧.

    Raises:
        DataError: if files are broken (a line names each of them before), or an id is outside the vocabulary.
        UsageError: if documents are to be decoded and there is no tokenizer.
    """
    yield from _check_files(root)
    index = open_index(root)
    held = f"{counted(len(index), 'document')}, {counted(index.tokens, 'token')}"
    yield f"tokenized data {root}: {held}, files: {len(index.files):,}"
    yield from _describe_types(index)
    yield from _describe_lengths(index)
    folder = root if root.is_dir() else root.parent
    found = load_tokenizer(tokenizer) if tokenizer else find_tokenizer(folder, above=True)
    origin = find_origin(folder) if found is None else None
    if origin is not None:
        found = origin.load()
        today = f" (today is {origin.template_date} for its template)" if origin.template_date else ""
        yield f"tokenized with: {origin.tokenizer}, as {origin.format}{today}"
        if problem := origin.problem():
            yield f"note: {problem}"
    yield from _describe_ids(index, found)
    if decode and found is None:
        raise UsageError(f"--decode needs a tokenizer: {(origin and origin.problem()) or 'give --tokenizer PATH'}")
    if decode and found:
        yield from decoded(index, found, decode)


def _check_files(root: Path) -> Iterator[str]:
    """Opens every file, and yields a line for each broken one."""
    messages, files = [], list_files(root)
    for name, *_ in files:
        try:
            TokenFile.open((root if root.is_dir() else root.parent) / name)
        except DataError as error:
            messages.append(str(error))
            yield f"broken: {error}"
    if messages:
        raise DataError(f"broken: {len(messages):,} of {counted(len(files), 'file')} below {root}")


def _describe_types(index: Index) -> Iterator[str]:
    lengths = index.documents[:, 1]
    for number, name in enumerate(index.types):
        files = [f for f, kind in enumerate(index.file_types) if kind == number]
        chosen = [lengths[index.first[f] : index.first[f + 1]] for f in files]
        documents, tokens = sum(map(len, chosen)), sum(int(c.sum()) for c in chosen)
        yield f"type {name}: {counted(documents, 'document')}, {counted(tokens, 'token')}"


def _describe_lengths(index: Index) -> Iterator[str]:
    """Yields a histogram of the documents' lengths: one line for each power of two."""
    lengths = index.documents[:, 1]
    if not len(lengths):
        return
    yield f"lengths: shortest {lengths.min():,}, mean {lengths.mean():,.1f}, longest {lengths.max():,}"
    counts = np.bincount(np.log2(lengths).astype(np.int64))
    for power in range(int(np.flatnonzero(counts)[0]), len(counts)):
        span = f"{2**power:,}-{2 ** (power + 1) - 1:,}"
        yield f"  {span:>21} {counts[power]:>12,} {'█' * math.ceil(BAR * counts[power] / counts.max())}"


def _describe_ids(index: Index, tokenizer: Tokenizer | None) -> Iterator[str]:
    largest, where = -1, ""
    for number, name in enumerate(index.files):
        file = index.file(number)
        file_largest = max((int(tokens_and_labels(ids)[0].max(initial=-1)) for ids in _all_ids(file)), default=-1)
        largest, where = max((largest, where), (file_largest, name))
    bits = max(largest, 0).bit_length()
    yield f"intact: every document can be read; the largest id is {largest:,} ({bits} bits), in {where}"
    if tokenizer is None:
        return
    if largest >= tokenizer.vocab_size:
        raise DataError(
            f"{index.root / where} has the token id {largest:,}, which is outside the vocabulary of {tokenizer.vocab_size:,} "
            f"({tokenizer.path})"
        )
    yield f"vocabulary: {tokenizer.vocab_size:,} entries ({tokenizer.path}); every id is in it"


def _all_ids(file: TokenFile) -> Iterator[Ids]:
    """Yields all ids of a file in pieces."""
    if not file.itemsize:
        yield from (file.read(document) for document in range(len(file.meta)))
        return
    ids = file.bytes.view(file.dtype)
    for start in range(0, len(ids), IDS_AT_ONCE):
        yield ids[start : start + IDS_AT_ONCE].astype(np.int64)


def decoded(index: Index, tokenizer: Tokenizer, count: int) -> Iterator[str]:
    """Yields the text of the first documents, each after a line that says which it is. Masked tokens are in ⟦ ⟧."""
    for document in range(min(count, len(index))):
        tokens, labels = tokens_and_labels(index.read(document))
        masked = labels < 0
        boundaries = [0, *(np.flatnonzero(np.diff(masked)) + 1).tolist(), len(tokens)]
        text = ""
        for a, b in pairwise(boundaries):
            part = tokenizer.decode(tokens[a:b].tolist())
            text += f"⟦{part}⟧" if masked[a] else part
        note = f", {int(masked.sum()):,} of them masked" if masked.any() else ""
        yield f"--- {index.location(document)}: {counted(len(tokens), 'token')}{note}"
        yield text
