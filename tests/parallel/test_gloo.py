"""Collectives that end at once in one group."""

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional

from internevo.parallel.world import World
from tests.pool import Pool


def gather_often(world: World) -> int:
    group = dist.group.WORLD
    assert group is not None
    mine = torch.full((8,), float(world.rank))
    for _ in range(600):
        coming = [functional.all_gather_single(mine + number, 0, group) for number in range(8)]
        for number, both in enumerate(coming):
            assert both.tolist() == [number] * 8 + [number + 1.0] * 8
    return world.rank


def test_many_gathers_at_once_leave_the_memory_whole(pool: Pool) -> None:
    """With two threads in a group, as PyTorch has it, a process died in two of three runs."""
    assert pool.run(gather_often, 2, device="cpu") == [0, 1]
