"""The exchange of token ids between the ranks of a stream: each rank encodes a share, and all ranks get everything.

Only the stream's thread uses the process group, and it calls the collectives in the same order on every rank. A rank that stops
or fails says so in the next round of the exchange, so that no rank waits forever.
"""

from __future__ import annotations

from contextlib import suppress
from datetime import timedelta

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from ...errors import DataError, InternEvoError

LEAVE_TIMEOUT = timedelta(seconds=60)
"""How long a rank that stops waits for the answer of the others."""
OK, STOPPED, FAILED = range(3)
"""The status that each rank gives in a round."""
Int32Array = npt.NDArray[np.int32]


class RankStoppedError(InternEvoError):
    """Another rank has stopped reading the stream."""


class Exchange:
    """An all-gather of arrays of different lengths over a gloo group. Without a group there is one rank."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank, self.size = (dist.get_rank(group), dist.get_world_size(group)) if group is not None else (0, 1)
        self.ended = False
        """A rank, this one or another, has stopped or failed. There are no more rounds."""

    def all_gather(self, share: Int32Array | DataError) -> list[Int32Array]:
        """Gathers the arrays of all ranks.

        Args:
            share: this rank's array, or an error if it has none.

        Raises:
            DataError: on every rank, if a rank gives an error.
            RankStoppedError: if another rank has stopped.
        """
        if isinstance(share, DataError):
            status, array = FAILED, np.frombuffer(str(share).encode(), np.uint8).astype(np.int32)
        else:
            status, array = OK, share
        statuses, lengths = self._gather_status(status, len(array))
        if STOPPED in statuses:
            self.ended = True
            raise RankStoppedError("another rank has stopped reading the data")
        if FAILED in statuses:
            self.ended = True
            rank = statuses.index(FAILED)
            raise DataError(bytes(self._broadcast(rank, array, lengths[rank]).astype(np.uint8)).decode())
        return [self._broadcast(rank, array, length) for rank, length in enumerate(lengths)]

    def leave(self) -> None:
        """Tells the other ranks that this one stops, and waits for them for up to ``LEAVE_TIMEOUT``.

        They answer in their next round, or when they stop as well. If this rank has failed, they may be waiting for it in a
        step of the training. Then there is no answer, and they end when this process ends.
        """
        if not self.ended:
            self.ended = True
            with suppress(InternEvoError):
                self._gather_status(STOPPED, 0, LEAVE_TIMEOUT)

    def _gather_status(self, status: int, length: int, timeout: timedelta | None = None) -> tuple[list[int], list[int]]:
        """Returns the status of every rank, and the length of its array."""
        if self.group is None:
            return [status], [length]
        gathered = [torch.empty(2, dtype=torch.int64) for _ in range(self.size)]
        work = dist.all_gather(gathered, torch.tensor([status, length]), group=self.group, async_op=True)
        try:
            work.wait(timeout) if timeout else work.wait()
        except RuntimeError as error:
            raise InternEvoError(f"another rank does not answer in the exchange of streamed data: {error}") from error
        statuses, lengths = torch.stack(gathered).T.tolist()
        return statuses, lengths

    def _broadcast(self, rank: int, share: Int32Array, length: int) -> Int32Array:
        """Returns the array of ``rank``, which has ``length`` numbers; ``share`` is this rank's own array."""
        if self.group is None or not length:
            return share[:length]
        numbers = torch.from_numpy(share) if rank == self.rank else torch.empty(length, dtype=torch.int32)
        dist.broadcast(numbers, group=self.group, group_src=rank)
        return numbers.numpy()
