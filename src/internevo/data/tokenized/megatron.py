"""Megatron-LM's indexed datasets: ``NAME.bin`` contains the ids, and ``NAME.idx`` says where the documents begin.

An ``.idx`` file consists of these little-endian values (https://github.com/NVIDIA/Megatron-LM,
megatron/core/datasets/indexed_dataset.py):

- the bytes ``MMIDIDX`` and two zeros; uint64: the version, 1; uint8: the type of the ids;
- uint64: the number of sequences; uint64: the number of document boundaries, which is the number of documents plus 1;
- int32: the length of each sequence; int64: the byte offset of each sequence;
- int64: the number of the first sequence of each document; last, the number of all sequences.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ...errors import DataError
from ...wording import counted

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
ITEMSIZES = {4: 4, 8: 2}
"""Bytes per id for each type of ids: int32 and uint16. Megatron-LM writes no other types for text."""


def read_index(path: Path) -> tuple[npt.NDArray[np.int64], int]:
    """Reads an ``.idx`` file. Returns [documents, 2], each document's byte offset and token count, and the bytes per id.

    Raises:
        DataError: if the file is not an index or is truncated, or the ids have another type.
    """
    content = path.read_bytes()
    if len(content) < HEADER.size or content[:9] != MAGIC:
        raise DataError(f"{path} is not the index of a Megatron dataset: it does not begin with MMIDIDX")
    _, version, code, sequences, boundaries = HEADER.unpack_from(content)
    if version != 1 or code not in ITEMSIZES:
        raise DataError(
            f"{path} has version {version} and ids of type {code}; only version 1 with type 4 (int32) or 8 (uint16) can be read"
        )
    expected = HEADER.size + 12 * sequences + 8 * boundaries
    if len(content) < expected:
        raise DataError(
            f"{path} is truncated: it has {counted(len(content), 'byte')}; {counted(sequences, 'sequence')} and "
            f"{counted(boundaries, 'document boundary')} take {expected:,}"
        )
    lengths = np.frombuffer(content, "<i4", sequences, HEADER.size).astype(np.int64)
    offsets = np.frombuffer(content, "<i8", sequences, HEADER.size + 4 * sequences)
    first = np.frombuffer(content, "<i8", boundaries, HEADER.size + 12 * sequences)
    if boundaries == 0 or first[0] != 0 or first[-1] != sequences or (np.diff(first) < 0).any():
        raise DataError(f"{path}: its document boundaries do not match its {sequences} sequences")
    itemsize = ITEMSIZES[code]
    ends = np.cumsum(lengths)
    if not np.array_equal(offsets, (ends - lengths) * itemsize):
        bad = int(np.argmax(offsets != (ends - lengths) * itemsize))
        raise DataError(f"{path}, sequence {bad}: its byte offset {offsets[bad]} is not where the sequence before it ends")
    starts = np.r_[0, ends][first]
    return np.stack([starts[:-1] * itemsize, np.diff(starts)], axis=1), itemsize
