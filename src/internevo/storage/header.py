"""The header of a safetensors file (https://huggingface.co/docs/safetensors): names, dtypes, shapes and offsets, as JSON."""

from __future__ import annotations

import itertools
import json
import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
CODES = {dtype: code for code, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000
"""The largest header that the safetensors library reads, in bytes."""
MAX_SIZE = 1 << 63
"""Sizes and offsets are less than this."""
CHUNK_BYTES = 1 << 20
"""Bytes that are read, converted and written at once. They fit into the processor's cache."""


@dataclass(frozen=True)
class Spec:
    """A tensor's shape and dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def rows(self) -> int:
        """The number of rows."""
        return math.prod(self.shape[:-1]) if len(self.shape) > 1 else math.prod(self.shape)

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of one row: [last dimension], or [] for a vector."""
        return self.shape[-1:] if len(self.shape) > 1 else ()

    @property
    def nbytes(self) -> int:
        """The size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def chunks(self, start: int, count: int) -> Iterable[tuple[int, int]]:
        """Divides ``count`` rows from row ``start`` into chunks of at most ``CHUNK_BYTES``, or of one row if a row is larger.

        Yields:
            (first row, number of rows) of each chunk.
        """
        step = max(1, CHUNK_BYTES // max(1, math.prod(self.row_shape) * self.dtype.itemsize))
        return ((row, min(step, start + count - row)) for row in range(start, start + count, step))


def parse_header(text: bytes) -> dict[str, tuple[Spec, int, int]]:
    """Returns name -> (spec, first byte, byte after the last) of every tensor, counted from the end of the header.

    Raises:
        ValueError, KeyError, TypeError, AttributeError, RecursionError: if it is not a header of the format.
    """
    if not text.startswith(b"{"):
        raise ValueError("its header is not a JSON object")
    header: dict[str, Any] = json.loads(
        text.decode(), object_pairs_hook=_unique_keys, parse_int=_natural, parse_float=_natural, parse_constant=_natural
    )
    metadata = header.pop("__metadata__", None)
    for key, value in metadata.items() if metadata is not None else ():
        key.encode()
        if not isinstance(value, str):
            raise ValueError(f"__metadata__ {key!r} is not a text")
        value.encode()
    found = {}
    for name, entry in header.items():
        name.encode()  # a lone surrogate is not a text
        if entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"tensor {name!r} has the keys {sorted(entry)}, which should be data_offsets, dtype and shape")
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"tensor {name!r} has dtype {entry['dtype']!r}, which is not supported")
        shape, (begin, end) = entry["shape"], entry["data_offsets"]
        if not isinstance(shape, list) or any(type(n) is not int for n in (*shape, begin, end)):
            raise ValueError(f"tensor {name!r} has a shape or offsets that are not numbers")
        if any(size >= MAX_SIZE for size in itertools.accumulate(shape, operator.mul)):
            raise ValueError(f"tensor {name!r} has the shape {shape}, which is too large")
        found[name] = Spec(tuple(shape), DTYPES[entry["dtype"]]), begin, end
    return found


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError(f"its header has a key twice, among {', '.join(map(repr, values))}")
    return values


def _natural(text: str) -> int:
    if not text.isdigit() or int(text) >= MAX_SIZE:
        raise ValueError(f"its header has the number {text}; all numbers must be natural numbers below 2**63")
    return int(text)


def make_header(specs: dict[str, Spec]) -> bytes:
    """Returns the header, with its length in front, of a file with these tensors one after the other."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, spec in specs.items():
        ends = [position, position + spec.nbytes]
        entries[name] = {"dtype": CODES[spec.dtype], "shape": list(spec.shape), "data_offsets": ends}
        position = ends[1]
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
