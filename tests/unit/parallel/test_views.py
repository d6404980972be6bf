"""Views: their arithmetic, and the process groups that are made from it."""

import itertools
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from internevo.parallel.layout import Layout, Meshes
from internevo.parallel.views import Groups, View
from internevo.parallel.world import World
from tests.pool import Pool

SIZES = st.lists(st.integers(1, 4), min_size=1, max_size=5)


def view_of(sizes: list[int]) -> View:
    return View({f"axis{n}": size for n, size in enumerate(sizes)})


@given(SIZES)
def test_every_axis_divides_the_world_into_groups_of_its_size(sizes: list[int]) -> None:
    view = view_of(sizes)
    for axis, size in view.axes.items():
        groups = view.groups(axis)
        assert sorted(itertools.chain(*groups)) == list(range(view.world))
        assert {len(group) for group in groups} == {size}


@given(SIZES)
def test_the_ranks_of_a_group_differ_only_in_its_axis(sizes: list[int]) -> None:
    view = view_of(sizes)
    for axis in view.axes:
        for group in view.groups(axis):
            coordinates = [view.coordinate(rank) for rank in group]
            assert [coordinate.pop(axis) for coordinate in coordinates] == list(range(len(group)))
            assert all(coordinate == coordinates[0] for coordinate in coordinates)


@given(SIZES)
def test_no_two_ranks_have_the_same_coordinate(sizes: list[int]) -> None:
    view = view_of(sizes)
    found = {tuple(view.coordinate(rank).values()) for rank in range(view.world)}
    assert len(found) == view.world and found == set(itertools.product(*(range(size) for size in sizes)))


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Layouts of every kind, including experts on several ranks."""
    mode = draw(st.sampled_from(["mtp", "msp", "fsp", "isp"]))
    stage, tensor, weight = (draw(st.sampled_from([1, 2, 4])) for _ in range(3))
    weight = weight if mode == "isp" else 1
    inner = weight if mode == "isp" else tensor
    expert, expert_inner = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2]))
    per_stage = max(tensor, weight, expert * expert_inner) * draw(st.sampled_from([4, 8]))
    zero = draw(st.sampled_from([n for n in (1, 2, 4) if per_stage // inner % n == 0]))
    expert_zero = draw(st.sampled_from([n for n in (1, 2) if per_stage // (expert * expert_inner) % n == 0]))
    kv_replicas = draw(st.sampled_from([1, 2])) if mode != "isp" and tensor > 1 else 1
    return Layout(
        stage * per_stage, tensor, mode, weight, stage, zero, False, kv_replicas,
        expert=expert, expert_inner=expert_inner, expert_zero=expert_zero,
    )  # fmt: skip


@given(layouts())
def test_all_views_arrange_the_same_world(layout: Layout) -> None:
    for view in (layout.activations, layout.weights, layout.experts, layout.kv_weights):
        assert view.world == layout.world
        # The stage is the first axis of each view, so that all groups of other axes are within a stage.
        assert view.groups("stage") == layout.weights.groups("stage")
    assert layout.data * layout.tensor == layout.replicate * layout.zero * layout.inner == layout.world // layout.pipeline
    for group in layout.activations.groups("tensor"):
        assert len({layout.data_rank(rank) for rank in group}) == 1, "a tensor group has the same rows"
    first = [layout.data_rank(rank) for rank in range(layout.world) if layout.is_first_with_its_rows(rank)]
    assert sorted(first) == list(range(layout.data)), "one of the ranks that have the same rows"


@given(layouts())
def test_the_named_groups_are_those_of_the_views(layout: Layout) -> None:
    all_groups, of_ranks = layout.groups(), [layout.groups_of(rank) for rank in range(layout.world)]
    assert {axis: len(groups[0]) for axis, groups in all_groups.items()} == layout.sizes()
    for axis, groups in all_groups.items():
        ranks = sorted(itertools.chain(*groups))
        if axis == "first and last":  # stages
            assert ranks == [
                r for r in range(layout.world) if layout.weights.coordinate(r)["stage"] in (0, layout.pipeline - 1)
            ]
            continue
        assert ranks == list(range(layout.world)), axis
        assert all(rank in of_rank[axis] for rank, of_rank in enumerate(of_ranks))
    assert all(of_rank.keys() == all_groups.keys() for of_rank in of_ranks)
    for axis, groups in all_groups.items():
        assert {tuple(of_rank[axis]) for of_rank in of_ranks} == set(map(tuple, groups))
        for group in groups:
            assert layout.axis_of("all-reduce", group) == next(name for name, others in all_groups.items() if group in others)
    assert layout.axis_of("all-reduce", list(range(layout.world))) in {*all_groups, "world"}


def test_the_groups_of_a_thousand_ranks() -> None:
    groups = Layout(1024, 8, "isp", 16, 8, 8, False, 1, expert=8, expert_inner=2, expert_zero=4).groups()
    assert groups["weight"][0] == list(range(16)) and groups["pipeline"][0] == list(range(0, 1024, 128))


def _shapes_of_meshes(world: World, layout: Layout) -> dict[str, Any]:
    import torch.distributed as dist

    meshes = Meshes.from_layout(layout, world.device.type)
    found: dict[str, Any] = {}
    views = {"weights": layout.weights, "tensor": layout.activations, "experts": layout.experts}
    for name, view in views.items():
        mesh = getattr(meshes, name)
        for axis in mesh.mesh_dim_names or ["tensor"]:
            ranks = next(group for group in view.groups(axis) if world.rank in group)
            dim = axis if mesh.mesh_dim_names else None
            assert dist.get_process_group_ranks(mesh.get_group(dim)) == ranks
            assert mesh.get_local_rank(dim) == view.coordinate(world.rank)[axis]
        found[name] = tuple(mesh.shape)
    groups = Groups()
    first, again = (groups.get(layout.activations.groups("tensor")) for _ in range(2))
    assert first is again and len(groups) <= 1
    return found


def test_meshes_have_the_groups_of_their_views(pool: Pool) -> None:
    layout = Layout(4, 2, "mtp", 1, 1, 2, False, 1, expert=2, expert_inner=1, expert_zero=2)
    assert pool.run(_shapes_of_meshes, 4, layout) == [{"weights": (1, 2, 2), "tensor": (2,), "experts": (1, 2, 2, 1)}] * 4


def _shares_a_communicator(_: World, layout: Layout) -> set[str]:
    """The axes whose exchanges of tokens share a process group with weights or gradients."""
    meshes = Meshes.from_layout(layout, "cpu")
    experts = meshes.experts
    assert experts is not None
    of_weights = [meshes.weights.get_group(axis) for axis in ("replicate", "zero", "inner")]
    of_weights += [experts.get_group(axis) for axis in ("replicate", "zero", "inner")]
    exchanging = {"tensor": meshes.tensor.get_group(), "expert": experts.get_group("expert")}
    return {axis for axis, group in exchanging.items() if group in of_weights and group.size() > 1}


def test_exchanges_of_tokens_do_not_queue_behind_weights(pool: Pool) -> None:
    """A sequence and a weight over the same ranks; experts over the ranks of a ZeRO group."""
    isp = Layout(4, 2, "isp", 2, 1, 2, False, 1, expert=2, expert_inner=1, expert_zero=2)
    everywhere = Layout(4, 1, "mtp", 1, 1, 4, False, 1, expert=4, expert_inner=1, expert_zero=1)
    for layout in (isp, everywhere):
        assert pool.run(_shares_a_communicator, 4, layout) == [set()] * 4
    megatron = Layout(4, 2, "msp", 1, 1, 2, False, 1, expert=2, expert_inner=1, expert_zero=2)
    assert pool.run(_shares_a_communicator, 4, megatron) == [{"tensor"}] * 4  # these weights stay where they are
