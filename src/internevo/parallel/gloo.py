"""gloo with one thread per group, for runs on CPUs.

PyTorch 2.13 gives a gloo group two threads. When two collectives end at once, both threads write the name of the last one
into the same ``std::string`` (``ProcessGroupGloo::runLoop``, ``lastCompletedWorkName``) without a lock. A name of more than 15
letters lies on the heap, and ALLGATHER_COALESCED, which every functional all-gather is, has 19: the heap is damaged, and the
process dies with "malloc(): unaligned tcache chunk detected" or a segmentation fault, rarely in training, within seconds when
nothing else is done. One thread works off a group's collectives in the order in which all ranks call them.
"""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist

BACKEND = "gloo_one_thread"


def register() -> str:
    """Makes the backend known to PyTorch; its name."""
    dist.Backend.register_backend(BACKEND, _create, devices=["cpu"])
    return BACKEND


def _create(store: dist.Store, rank: int, size: int, timeout: timedelta) -> dist.ProcessGroupGloo:
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout, options._threads = timeout, 1
    options._devices = [dist.ProcessGroupGloo.create_default_device()]
    group = dist.ProcessGroupGloo(store, rank, size, options)
    group._set_sequence_number_for_group()
    return group
