"""Collectives that end at once in one group."""

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional

from internevo.parallel import gloo
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


def threads(world: World) -> list[int]:
    """Of the run's group, of one for a thread beside training, and of one of a mesh."""
    mesh = dist.init_device_mesh("cpu", (world.size,), mesh_dim_names=("all",))
    groups = [dist.group.WORLD, gloo.new_group(), mesh["all"].get_group()]
    return [group._get_backend(torch.device("cpu")).options._threads for group in groups]  # type: ignore[union-attr, attr-defined]


def test_every_group_has_one_thread(pool: Pool) -> None:
    assert pool.run(threads, 2, device="cpu") == [[1, 1, 1]] * 2


def test_many_gathers_at_once_leave_the_memory_whole(pool: Pool) -> None:
    """With two threads in a group, as PyTorch has it, a process died in two of three runs (on a machine with time to spare)."""
    assert pool.run(gather_often, 2, device="cpu") == [0, 1]
