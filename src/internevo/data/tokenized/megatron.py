"""Megatron-LM's indexed datasets: ``NAME.bin`` holds the ids, ``NAME.idx`` says where documents begin.

``.idx``, little-endian (https://github.com/NVIDIA/Megatron-LM, megatron/core/datasets/indexed_dataset.py): the bytes
``MMIDIDX`` and two zeros, uint64 version 1, uint8 type of an id, uint64 number of sequences and uint64 of document borders;
then int32 length and int64 byte offset of each sequence, and int64 number of the first sequence of each document (and one
behind the last).
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ...errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
ITEMSIZES = {4: 4, 8: 2}
"""Bytes of an id by its type's code: int32 and uint16, which is all that Megatron writes for text."""


def read_index(path: Path) -> tuple[npt.NDArray[np.int64], int]:
    """[documents, 2] of byte offset and token count, and the bytes of an id.

    Raises:
        DataError: when the file is no index, is cut off, or has ids of another type.
    """
    content = path.read_bytes()
    if len(content) < HEADER.size or content[:9] != MAGIC:
        raise DataError(f"{path} is not the index of a Megatron dataset: it does not begin with MMIDIDX")
    _, version, code, sequences, borders = HEADER.unpack_from(content)
    if version != 1 or code not in ITEMSIZES:
        raise DataError(
            f"{path} has version {version} and ids of type {code}; known are version 1 and types 4 (int32), 8 (uint16)"
        )
    expected = HEADER.size + 12 * sequences + 8 * borders
    if len(content) < expected:
        raise DataError(
            f"{path} is truncated: {sequences} sequences and {borders} borders take {expected} bytes, it has {len(content)}"
        )
    lengths = np.frombuffer(content, "<i4", sequences, HEADER.size).astype(np.int64)
    offsets = np.frombuffer(content, "<i8", sequences, HEADER.size + 4 * sequences)
    first = np.frombuffer(content, "<i8", borders, HEADER.size + 12 * sequences)
    if borders == 0 or first[0] != 0 or first[-1] != sequences or (np.diff(first) < 0).any():
        raise DataError(f"{path}: the borders of its documents are not those of {sequences} sequences")
    itemsize = ITEMSIZES[code]
    ends = np.cumsum(lengths)
    if not np.array_equal(offsets, (ends - lengths) * itemsize):
        bad = int(np.argmax(offsets != (ends - lengths) * itemsize))
        raise DataError(f"{path}, sequence {bad}: its offset {offsets[bad]} is not where the one before ends")
    starts = np.r_[0, ends][first]
    return np.stack([starts[:-1] * itemsize, np.diff(starts)], axis=1), itemsize
