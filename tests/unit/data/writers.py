"""Writes small datasets in every format of tokenized data."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from internevo.data.tokenized.files import TokenWriter

DOCUMENTS = st.lists(st.lists(st.integers(0, 500), min_size=1, max_size=40), min_size=1, max_size=30)
"""Random token ids of documents."""


def write_json(path: Path, documents: Any, dtype: Any = np.int64) -> None:
    """Writes JSON lines, as the original InternEvo does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    meta, offset = [], 0
    with open(path, "wb") as file:
        for ids in documents:
            line = (json.dumps({"tokens": [int(i) for i in ids]}) + "\n").encode()
            file.write(line)
            meta.append((offset, len(ids)))
            offset += len(line)
    with open(f"{path}.meta", "wb") as file:
        np.save(file, np.array(meta, dtype=dtype).reshape(-1, 2))


def write_binary(path: Path, documents: Any, vocab_size: int | None) -> None:
    """Writes the compact form."""
    writer = TokenWriter(path, vocab_size)
    for ids in documents:
        writer.write(np.array(ids), np.array([len(ids)]))
    writer.close()


def write_megatron(path: Path, documents: Any, dtype: Any, code: int) -> None:
    """Writes what Megatron-LM's IndexedDatasetBuilder writes; a document is a list of sequences."""
    lengths = [len(sequence) for document in documents for sequence in document]
    flat = [token for document in documents for sequence in document for token in sequence]
    path.with_suffix(".bin").write_bytes(np.array(flat, dtype).tobytes())
    offsets = np.cumsum([0, *lengths])[:-1] * np.dtype(dtype).itemsize
    boundaries = np.cumsum([0, *map(len, documents)])
    with open(path.with_suffix(".idx"), "wb") as file:
        file.write(b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(lengths), len(boundaries)))
        for array, kind in ((lengths, "<i4"), (offsets, "<i8"), (boundaries, "<i8")):
            file.write(np.array(array, kind).tobytes())
