"""gloo with one thread per group: for runs on CPUs, and for what goes on beside training on GPUs as well.

PyTorch 2.13 gives a gloo group two threads. When two collectives end at once, both threads write the name of the last one
into the same ``std::string`` (``ProcessGroupGloo::runLoop``, ``lastCompletedWorkName``) without a lock. A name of more than 15
letters lies on the heap, and ALLGATHER_COALESCED, which every functional all-gather is, has 19: the heap is damaged, and the
process dies with "malloc(): unaligned tcache chunk detected" or a segmentation fault, rarely in training, within seconds when
nothing else is done. One thread works off a group's collectives in the order in which all ranks call them.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

BACKEND = "gloo_one_thread"
BACKGROUND = timedelta(hours=2)
"""Time-out of what goes on beside training: a checkpoint is written and exported, or documents are tokenized, meanwhile."""


def register() -> str:
    """Makes the backend known to PyTorch; its name."""
    # As PyTorch's gloo: a group that was asked for while the run's own is bound to a GPU must have a backend for GPUs.
    dist.Backend.register_backend(BACKEND, _create, devices=["cpu", "cuda"])
    return BACKEND


def new_group(timeout: timedelta = BACKGROUND) -> dist.ProcessGroup:
    """A group of all ranks for a thread beside training, whose collectives must not meet those of training.

    Every rank must call it. While a collective is under way, the group cannot be freed: see ``world.join``.
    """
    group = dist.new_group(timeout=timeout, backend=register())
    assert isinstance(group, dist.ProcessGroup)
    return group


def _create(store: dist.Store, rank: int, size: int, timeout: timedelta) -> dist.ProcessGroupGloo:
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout, options._threads = timeout, 1
    options._devices = [dist.ProcessGroupGloo.create_default_device()]
    group = dist.ProcessGroupGloo(store, rank, size, options)
    group._set_sequence_number_for_group()
    return group


class _Allocates:
    """Where FSDP's collectives get their buffers."""

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised buffer."""
        return torch.empty(*size, dtype=dtype, device=device)


class Gathers(_Allocates):
    """All-gathers for ``fully_shard`` that never wait where they are called: there are no streams on a CPU, so what is gathered
    ahead goes on in gloo's thread until it is needed."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        return dist.all_gather_into_tensor(output_tensor, input_tensor, group=group, async_op=True)


class Reductions(_Allocates):
    """gloo's own reduce-scatter for ``fully_shard``, which takes a list: that of one tensor is an all-reduce of a copy.

    Deferred, reductions go on in gloo's thread (there are no streams) while backward computes, until somebody waits. That is
    right where nothing else happens to their results before: one reduction per step, and no replicas.
    """

    def __init__(self, deferred: bool) -> None:
        self.deferred = deferred
        self.works: list[dist.Work] = []

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> dist.Work:
        work = dist.reduce_scatter(output_tensor, list(input_tensor.chunk(group.size())), op=op, group=group, async_op=True)
        assert work is not None
        if self.deferred:
            self.works.append(work)
        else:
            work.wait()
        return work

    def wait(self) -> None:
        """For all of them."""
        for work in self.works:
            work.wait()
        self.works = []


def wait_for(reduced: Tensor) -> None:
    """Before backward goes on."""
    if reduced.is_cuda:
        torch.cuda.current_stream().synchronize()
