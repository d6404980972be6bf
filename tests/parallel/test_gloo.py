"""Collectives that end at once in one group."""

import os

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import torch.multiprocessing as multiprocessing

from internevo.parallel.world import join
from tests.pool import free_port, place


def _gather(rank, port, folder):
    os.environ.update(place(rank, 2, port), INTERNEVO_DEVICE="cpu")
    torch.set_num_threads(1)
    with join(launcher="torch"):
        mine = torch.full((8,), float(rank))
        for _ in range(600):
            coming = [functional.all_gather_single(mine + number, 0, dist.group.WORLD) for number in range(8)]
            for number, both in enumerate(coming):
                assert both.tolist() == [number] * 8 + [number + 1.0] * 8
    (folder / str(rank)).touch()


def test_many_gathers_at_once_leave_the_memory_whole(tmp_path):
    """With two threads in a group, as PyTorch has it, a process died in two of three runs."""
    multiprocessing.spawn(_gather, (free_port(), tmp_path), nprocs=2)
    assert (tmp_path / "0").exists() and (tmp_path / "1").exists()
