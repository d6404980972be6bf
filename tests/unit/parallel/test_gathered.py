"""isp's prefetch: which weights are prefetched while which others are used. Arithmetic only."""

import itertools

import pytest

from internevo.config.parallel import Weight
from internevo.parallel.gathered import GatheredWeights, set_prefetch_order, set_prefetch_order_of_experts

PER_LAYER = ("wqkv", "wo", "w1", "w2")
"""The weights of a layer, in the order of the forward pass. A layer with experts and without a shared one has the first two."""

PLACES = {"wqkv": "wqkv", "attn": "wo", "wo": "wo", "w1": "w1"}
"""``launch_allgather_before`` -> the weights with whose use the prefetch begins. Attention has no weights; Next is wo."""
CASES = [("module", "wo"), *(("layer", before) for before in PLACES)]


def prefetches(
    layers: int, unit: str, before: str, overlap: bool = True, sparse: int = 0
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Returns weights -> the weights that are prefetched while they are used, in the forward and in the backward pass.

    Weights are named LAYER.NAME. ``sparse``: each layer whose number is a multiple of it has experts, and no MLP.
    """
    per_layer = [PER_LAYER[:2] if sparse and layer % sparse == 0 else PER_LAYER for layer in range(layers)]
    names = [f"{layer}.{name}" for layer in range(layers) for name in per_layer[layer]]
    by_layer = [[GatheredWeights(None, [], None) for _ in of_layer] for of_layer in per_layer]  # type: ignore[arg-type]
    made = list(itertools.chain.from_iterable(by_layer))
    settings = {"overlap": overlap, "forward_overlap_per": unit, "launch_allgather_before": before}
    set_prefetch_order(by_layer, Weight.model_validate(settings), attention=2)
    assert {weights.overlap for weights in made} == {overlap}
    name_of = dict(zip(map(id, made), names, strict=True))
    forward, backward = (
        {name: [name_of[id(other)] for other in getattr(weights, side)] for name, weights in zip(names, made, strict=True)}
        for side in ("next_forward", "next_backward")
    )
    return forward, backward


@pytest.mark.parametrize(("unit", "before"), CASES)
@pytest.mark.parametrize("layers", [1, 2, 5])
@pytest.mark.parametrize("sparse", [0, 1, 2])
def test_all_weights_but_the_first_are_prefetched_once_and_before_their_use(
    layers: int, unit: str, before: str, sparse: int
) -> None:
    forward, backward = prefetches(layers, unit, before, sparse=sparse)
    order = list(forward)
    for direction, names in ((forward, order), (backward, order[::-1])):
        prefetched = list(itertools.chain.from_iterable(direction[name] for name in names))
        assert sorted(prefetched) == sorted(names[1:])
        while_using = {name: user for user in names for name in direction[user]}
        assert all(names.index(while_using[name]) < names.index(name) for name in names[1:])


def test_per_module_the_next_weights_are_prefetched() -> None:
    forward, _ = prefetches(2, "module", "w1")  # launch_allgather_before has no effect here
    assert forward == {
        "0.wqkv": ["0.wo"], "0.wo": ["0.w1"], "0.w1": ["0.w2"], "0.w2": ["1.wqkv"],
        "1.wqkv": ["1.wo"], "1.wo": ["1.w1"], "1.w1": ["1.w2"], "1.w2": [],
    }  # fmt: skip


@pytest.mark.parametrize("before", PLACES)
def test_per_layer_the_whole_next_layer_is_prefetched_at_one_place(before: str) -> None:
    """In the first layer, which no layer before it has prefetched, the next weights are prefetched, too."""
    forward, _ = prefetches(4, "layer", before)
    for layer in range(4):
        next_layer = [f"{layer + 1}.{name}" for name in PER_LAYER] if layer < 3 else []
        for name, after in itertools.zip_longest(PER_LAYER, PER_LAYER[1:]):
            same_layer = [f"{layer}.{after}"] if layer == 0 and after else []
            assert forward[f"{layer}.{name}"] == same_layer + (next_layer if name == PLACES[before] else []), (layer, name)


@pytest.mark.parametrize(("unit", "before"), CASES)
def test_in_the_backward_pass_the_weights_before_are_prefetched(unit: str, before: str) -> None:
    _, backward = prefetches(3, unit, before)
    order = list(backward)
    assert list(backward.values()) == [[], *([name] for name in order[:-1])]


@pytest.mark.parametrize("overlap", [True, False])
def test_all_weights_know_whether_to_prefetch(overlap: bool) -> None:
    prefetches(2, "module", "wo", overlap)


def test_experts_of_a_layer_prefetch_those_of_the_next_and_in_the_backward_pass_of_the_layer_before() -> None:
    made = [GatheredWeights(None, [], None) for _ in range(3)]  # type: ignore[arg-type]
    set_prefetch_order_of_experts(made, overlap=True)
    assert [weights.next_forward for weights in made] == [[made[1]], [made[2]], []]
    assert [weights.next_backward for weights in made] == [[], [made[0]], [made[1]]]
    assert all(weights.overlap for weights in made)
