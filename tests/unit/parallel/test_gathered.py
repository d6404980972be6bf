"""isp's prefetch by arithmetic alone: while which weights are used, which others are gathered."""

import itertools

import pytest

from internevo.config.parallel import Weight
from internevo.parallel.gathered import PER_LAYER, GatheredWeights, connect

PLACES = {"wqkv": "wqkv", "attn": "wo", "wo": "wo", "w1": "w1"}
"""With which weights' use a setting begins: attention has none, and what comes after it is wo."""
CASES = [("module", "wo"), *(("layer", before) for before in PLACES)]


def fetches(layers: int, unit: str, before: str, overlap: bool = True) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """What is gathered while each weight is used: forward, and backward. Weights are named LAYER.NAME."""
    names = [f"{layer}.{name}" for layer in range(layers) for name in PER_LAYER]
    made = [GatheredWeights(None, [], None) for _ in range(layers) for _ in PER_LAYER]  # type: ignore[arg-type]
    settings = {"overlap": overlap, "forward_overlap_per": unit, "launch_allgather_before": before}
    connect(made, Weight.model_validate(settings))
    assert {weights.overlap for weights in made} == {overlap}
    name_of = dict(zip(map(id, made), names, strict=True))
    forward, backward = (
        {name: [name_of[id(other)] for other in getattr(weights, side)] for name, weights in zip(names, made, strict=True)}
        for side in ("next_forward", "next_backward")
    )
    return forward, backward


@pytest.mark.parametrize(("unit", "before"), CASES)
@pytest.mark.parametrize("layers", [1, 2, 5])
def test_every_weight_but_the_first_is_gathered_once_and_before_its_use(layers: int, unit: str, before: str) -> None:
    forward, backward = fetches(layers, unit, before)
    order = list(forward)
    for direction, names in ((forward, order), (backward, order[::-1])):
        fetched = list(itertools.chain.from_iterable(direction[name] for name in names))
        assert sorted(fetched) == sorted(names[1:])
        while_using = {name: user for user in names for name in direction[user]}
        assert all(names.index(while_using[name]) < names.index(name) for name in names[1:])


def test_per_module_it_is_always_the_next_one() -> None:
    forward, _ = fetches(2, "module", "w1")  # the place has no meaning here
    assert forward == {
        "0.wqkv": ["0.wo"], "0.wo": ["0.w1"], "0.w1": ["0.w2"], "0.w2": ["1.wqkv"],
        "1.wqkv": ["1.wo"], "1.wo": ["1.w1"], "1.w1": ["1.w2"], "1.w2": [],
    }  # fmt: skip


@pytest.mark.parametrize("before", PLACES)
def test_per_layer_it_is_the_whole_next_layer_from_one_place_on(before: str) -> None:
    """Within the first layer, whose weights no layer before it has gathered, it is the next one as well."""
    forward, _ = fetches(4, "layer", before)
    for layer in range(4):
        following = [f"{layer + 1}.{name}" for name in PER_LAYER] if layer < 3 else []
        for name, after in itertools.zip_longest(PER_LAYER, PER_LAYER[1:]):
            own = [f"{layer}.{after}"] if layer == 0 and after else []
            assert forward[f"{layer}.{name}"] == own + (following if name == PLACES[before] else []), (layer, name)


@pytest.mark.parametrize(("unit", "before"), CASES)
def test_backward_it_is_always_the_one_before(unit: str, before: str) -> None:
    _, backward = fetches(3, unit, before)
    order = list(backward)
    assert list(backward.values()) == [[], *([name] for name in order[:-1])]


@pytest.mark.parametrize("overlap", [True, False])
def test_all_weights_know_whether_to_gather_ahead(overlap: bool) -> None:
    fetches(2, "module", "wo", overlap)
