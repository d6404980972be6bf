"""gloo with one thread per group. Runs on CPUs use it, and so do the background threads of runs on GPUs.

PyTorch 2.13 gives each gloo group two threads. If two collectives end at the same time, both threads write the name of the last
one into the same ``std::string`` (``ProcessGroupGloo::runLoop``, ``lastCompletedWorkName``) without a lock. A name of more than
15 characters is on the heap, and that of every functional all-gather, ALLGATHER_COALESCED, has 19: the heap is damaged, and the
process dies with "malloc(): unaligned tcache chunk detected" or a segmentation fault. That is rare in training, and happens
within seconds if there is nothing but collectives. With one thread, the collectives of a group run one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

BACKEND = "gloo_one_thread"
BACKGROUND_TIMEOUT = timedelta(hours=2)
"""Time-out of the collectives of background threads. Between them, a checkpoint may be written and exported, or documents may
be tokenized."""


def register() -> str:
    """Registers the backend with PyTorch. Returns its name."""
    # For "cuda" as well, as PyTorch's gloo: if the default group is bound to a GPU, every group needs a backend for GPUs.
    dist.Backend.register_backend(BACKEND, _create, devices=["cpu", "cuda"])
    return BACKEND


def new_group(timeout: timedelta = BACKGROUND_TIMEOUT) -> dist.ProcessGroup:
    """Makes a group of all ranks for a background thread, so that its collectives do not mix with those of training.

    Every rank must call it. The group cannot be freed while a collective is running: see ``world.join``.
    """
    group = dist.new_group(timeout=timeout, backend=register())
    assert isinstance(group, dist.ProcessGroup)
    return group


def is_used(device: torch.device) -> bool:
    """Whether the tensors of a device go over gloo: those of CPUs, except in a pretended world."""
    return device.type == "cpu" and dist.get_backend() == BACKEND


def _create(store: dist.Store, rank: int, size: int, timeout: timedelta) -> dist.ProcessGroupGloo:
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout, options._threads = timeout, 1
    options._devices = [dist.ProcessGroupGloo.create_default_device()]
    group = dist.ProcessGroupGloo(store, rank, size, options)
    group._set_sequence_number_for_group()
    return group


class _Allocator:
    """Allocates the buffers of the collectives of ``fully_shard``."""

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Returns an uninitialised buffer."""
        return torch.empty(*size, dtype=dtype, device=device)


class AllGather(_Allocator):
    """The all-gather of ``fully_shard`` on CPUs.

    It does not wait where it is called. A CPU has no streams, so prefetched weights are gathered in gloo's thread.
    """

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        return dist.all_gather_single(output_tensor, input_tensor, group=group, async_op=True)


class ReduceScatter(_Allocator):
    """The reduce-scatter of ``fully_shard`` on CPUs.

    It calls gloo's reduce-scatter of a list of tensors. (That of a single tensor would be an all-reduce of a copy.)
    """

    def __init__(self, deferred: bool) -> None:
        """
        Args:
            deferred: do not wait where it is called but in ``wait``. Meanwhile gloo's thread reduces while the backward pass
                computes. Nothing may use the results before: this is right for one reduction per step without replicas.
        """
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
        """Waits for all deferred reductions."""
        for work in self.works:
            work.wait()
        self.works = []


def wait_for_reduction(reduced: Tensor) -> None:
    """Waits for a reduction, so that the backward pass does not continue before it is complete."""
    if reduced.is_cuda:
        torch.cuda.current_stream().synchronize()
