"""The shuffled order of rows: a permutation for each epoch, which is computed at any index and never stored.

The rows of a global batch are a range of this order. So they depend only on the seed and the data, not on the ranks, and not on
what the run did before.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

ROUNDS = 6
"""The number of rounds of the Feistel network."""


@dataclass(frozen=True)
class Order:
    """An endless sequence of row numbers. Every epoch has each row once, in a different order."""

    rows: int
    """The number of rows in an epoch."""
    seed: int

    def __call__(self, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Returns the row numbers at ``indices`` (0, 1, 2, ...) of the sequence."""
        epochs, within = np.divmod(indices, self.rows)
        out = np.empty_like(indices)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            out[chosen] = permute(within[chosen], self.rows, f"{self.seed}/{epoch}")
        return out


def permute(indices: npt.NDArray[np.int64], size: int, key: str) -> npt.NDArray[np.int64]:
    """Returns the values at ``indices`` of a pseudo-random permutation of ``range(size)``, which ``key`` chooses.

    The permutation is a Feistel network on the smallest even number of bits that can represent ``size``. Values outside the
    range go through it again, fewer than 4 times on average (cycle walking,
    https://web.cs.ucdavis.edu/~rogaway/papers/subset.pdf).
    """
    if size <= 1:
        return np.zeros_like(indices)
    half = (max(int(size - 1).bit_length(), 2) + 1) // 2
    mask = np.uint64((1 << half) - 1)
    digest = hashlib.sha512(key.encode()).digest()
    keys = np.frombuffer(digest[: 8 * ROUNDS], dtype=np.uint64)
    values = indices.astype(np.uint64)
    todo = np.ones(len(values), bool)
    while todo.any():
        left, right = values[todo] >> np.uint64(half), values[todo] & mask
        for round_key in keys:
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        values[todo] = (left << np.uint64(half)) | right
        todo &= values >= size
    return values.astype(np.int64)


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Mixes the bits of 64-bit integers, so that each bit affects all others (the finalizer of splitmix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
