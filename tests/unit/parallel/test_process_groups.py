"""How many process groups a rank of a large run makes. PyTorch's fake backend stands for the other ranks."""

import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from internevo.parallel.layout import Layout, Meshes
from internevo.parallel.messages import Channels
from internevo.parallel.plan import _tied_group

PIPELINES = [(1, 1, "1F1B"), (2, 2, "ZBV"), (3, 2, "1F1B"), (4, 1, "ZBH1"), (8, 2, "1F1B")]
"""Ranks, chunks and schedule. Of three ranks in a ring, no two links can be made at the same time."""
MODES = [("mtp", 1, 1, 1), ("mtp", 8, 1, 4), ("fsp", 4, 1, 1), ("isp", 1, 8, 1), ("isp", 8, 16, 1), ("isp", 16, 4, 1)]
"""Mode, tensor, weight, ranks with the same key/value head."""
TIED: Any = SimpleNamespace(tie_embeddings=True)
ZERO = [4, None]
"""None: as many as there are."""
EXPERTS = [(1, None, 1), (4, 2, 1), (16, None, 1), (4, None, 2), (8, None, 4)]
"""Ranks with different experts; over how many their optimizer state is sharded; over how many each expert is."""


def large_layouts() -> Iterator[Layout]:
    for (stages, chunks, schedule), (mode, tensor, weight, kv), zero, (expert, expert_zero, expert_inner) in itertools.product(
        PIPELINES, MODES, ZERO, EXPERTS
    ):
        if mode != "isp" and expert_inner > 1:
            expert_inner = tensor
        world = 768 if stages == 3 else 1024
        ranks, inner = world // stages, weight if mode == "isp" else tensor
        yield Layout(
            world, tensor, mode, weight, stages, zero or ranks // inner, False, kv, chunks, schedule,
            expert=expert, expert_inner=expert_inner, expert_zero=expert_zero or ranks // (expert * expert_inner),
        )  # fmt: skip


@pytest.fixture
def fake_ranks() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def sizes(layout: Layout, rank: int) -> list[int]:
    """The sizes of the process groups that a rank makes besides that of all ranks."""
    dist.init_process_group("fake", rank=rank, world_size=layout.world, store=FakeStore())
    groups = Meshes.from_layout(layout, "cpu").groups
    if layout.pipeline > 1:
        of_stages = [layout.rank_of_stage(stage) for stage in range(layout.stages)]
        Channels(groups, layout.weights.groups("stage"), of_stages, torch.device("cpu"), torch.float32)
        _tied_group(TIED, layout, groups, of_stages)
    found = [dist.get_world_size(group) for group in groups]
    dist.destroy_process_group()
    return found


@pytest.mark.usefixtures("fake_ranks")
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: "-".join(map(str, mode)))
def test_a_rank_is_in_fewer_than_12_process_groups(mode: tuple[str, int, int, int]) -> None:
    layouts = [layout for layout in large_layouts() if (layout.mode, layout.tensor, layout.weight, layout.kv_replicas) == mode]
    assert len(layouts) == len(PIPELINES) * len(ZERO) * len(EXPERTS)
    for layout in layouts:
        for rank in {0, layout.world // 2}:  # of the first stage, and of one in the middle
            found = sizes(layout, rank)
            assert sum(size > 1 for size in found) < 12, (layout, rank, found)
            assert found.count(1) <= 3, "groups of one rank, where others have a group that this rank is not in"


@pytest.mark.usefixtures("fake_ranks")
@pytest.mark.parametrize(("stages", "chunks"), [(2, 1), (2, 2), (3, 2), (4, 1), (4, 2), (5, 2), (6, 2)])
def test_all_ranks_make_a_group_or_none_does(stages: int, chunks: int) -> None:
    """Also for tied embeddings in a ring, where only the first and the last rank send messages to each other. (NCCL would wait
    for the ranks that make no group.)"""
    layout = Layout(2 * stages, 2, "mtp", 1, stages, 1, False, chunks=chunks)
    assert len({len(sizes(layout, rank)) for rank in range(layout.world)}) == 1
