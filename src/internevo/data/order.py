"""The order of rows: a permutation per epoch that is evaluated at any place without being stored.

The global batch of a step is the rows at ``consumed .. consumed + batch`` of this order. It depends on the seed and the
data, and on no rank and no history.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

ROUNDS = 6


@dataclass(frozen=True)
class Order:
    """An endless sequence of row numbers; every epoch has each row once, in an order of its own."""

    rows: int
    seed: int

    def __call__(self, places: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Row numbers at ``places`` (0, 1, 2, ...)."""
        epochs, within = np.divmod(places, self.rows)
        out = np.empty_like(places)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            out[chosen] = permute(within[chosen], self.rows, f"{self.seed}/{epoch}")
        return out


def permute(places: npt.NDArray[np.int64], size: int, key: str) -> npt.NDArray[np.int64]:
    """A pseudo-random permutation of ``range(size)``, chosen by ``key``, at ``places``.

    A Feistel network on the smallest even number of bits that holds ``size``; values outside are sent through again
    (cycle walking, https://web.cs.ucdavis.edu/~rogaway/papers/subset.pdf), fewer than 4 times on average.
    """
    if size <= 1:
        return np.zeros_like(places)
    half = (max(int(size - 1).bit_length(), 2) + 1) // 2
    mask = np.uint64((1 << half) - 1)
    digest = hashlib.sha512(key.encode()).digest()
    keys = np.frombuffer(digest[: 8 * ROUNDS], dtype=np.uint64)
    values = places.astype(np.uint64)
    todo = np.ones(len(values), bool)
    while todo.any():
        left, right = values[todo] >> np.uint64(half), values[todo] & mask
        for round_key in keys:
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        values[todo] = (left << np.uint64(half)) | right
        todo &= values >= size
    return values.astype(np.int64)


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """splitmix64's finalizer: spreads every bit over the word."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
