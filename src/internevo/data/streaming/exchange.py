"""What the ranks of a stream tell each other: each tokenizes a share, and all get everything.

The group is used by the stream's thread alone, in the same order on every rank. A rank that stops says so in the round that
the others wait in, so that none waits for ever.
"""

from __future__ import annotations

from contextlib import suppress
from datetime import timedelta

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from ...errors import DataError, InternEvoError

PATIENCE = timedelta(seconds=60)
GOOD, LEAVES, FAILED = range(3)
Numbers = npt.NDArray[np.int32]


class OthersLeft(InternEvoError):
    """Another rank has stopped reading."""


class Exchange:
    """Rounds over a gloo group; without a group there is one rank."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank, self.size = (dist.get_rank(group), dist.get_world_size(group)) if group is not None else (0, 1)
        self.over = False
        """A rank has left, this one or another."""

    def __call__(self, mine: Numbers | DataError) -> list[Numbers]:
        """Every rank's numbers.

        Raises:
            DataError: on every rank, when one of them gives it.
            OthersLeft: when one has left.
        """
        if isinstance(mine, DataError):
            code, numbers = FAILED, np.frombuffer(str(mine).encode(), np.uint8).astype(np.int32)
        else:
            code, numbers = GOOD, mine
        codes, lengths = self._announce(code, len(numbers))
        if LEAVES in codes:
            self.over = True
            raise OthersLeft("another rank has stopped reading the data")
        if FAILED in codes:
            self.over = True
            rank = codes.index(FAILED)
            raise DataError(bytes(self._from(rank, numbers, lengths[rank]).astype(np.uint8)).decode())
        return [self._from(rank, numbers, length) for rank, length in enumerate(lengths)]

    def leave(self) -> None:
        """Tells the others that no more is wanted.

        They answer when they leave as well, or come to the next round. When this rank fails they may be held up in a step
        that waits for this rank: then it goes without an answer, and its end ends them.
        """
        if not self.over:
            self.over = True
            with suppress(InternEvoError):
                self._announce(LEAVES, 0, PATIENCE)

    def _announce(self, code: int, length: int, patience: timedelta | None = None) -> tuple[list[int], list[int]]:
        if self.group is None:
            return [code], [length]
        everyone = [torch.empty(2, dtype=torch.int64) for _ in range(self.size)]
        work = dist.all_gather(everyone, torch.tensor([code, length]), group=self.group, async_op=True)
        try:
            work.wait(patience) if patience else work.wait()
        except RuntimeError as error:
            raise InternEvoError(f"another rank does not answer in the exchange of streamed data: {error}") from error
        codes, lengths = torch.stack(everyone).T.tolist()
        return codes, lengths

    def _from(self, rank: int, mine: Numbers, length: int) -> Numbers:
        if self.group is None or not length:
            return mine[:length]
        numbers = torch.from_numpy(mine) if rank == self.rank else torch.empty(length, dtype=torch.int32)
        dist.broadcast(numbers, group=self.group, group_src=rank)
        return numbers.numpy()
