"""Many collectives in one gloo group that end at the same time."""

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional

from internevo.parallel.world import World
from tests.pool import Pool


def gather_often(world: World) -> int:
    group = dist.group.WORLD
    assert group is not None
    x = torch.full((8,), float(world.rank))
    for _ in range(600):
        started = [functional.all_gather_single(x + number, 0, group) for number in range(8)]
        for number, gathered in enumerate(started):
            assert gathered.tolist() == [number] * 8 + [number + 1.0] * 8
    return world.rank


def test_many_gathers_at_once_do_not_damage_the_heap(pool: Pool) -> None:
    """With two threads per group, which is PyTorch's default, a process died in two of three runs."""
    assert pool.run(gather_often, 2, device="cpu") == [0, 1]
