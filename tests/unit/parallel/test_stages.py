"""How layers are divided among stages: by cost as evenly as possible, or by hand."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internevo.models.config import DecoderConfig, Experts, Stage
from internevo.models.decoder import Decoder
from internevo.parallel.messages import rounds
from internevo.parallel.stages import costs, deal, head_cost, layer_costs, split

CONFIG = DecoderConfig("LLAMA2", 4096, 32, 48, num_layers=6, num_heads=4, num_kv_heads=2, head_dim=8)


@given(layers=st.lists(st.floats(0.1, 5), min_size=1, max_size=8), parts=st.integers(1, 4), last=st.floats(0, 8))
def test_the_largest_part_is_as_small_as_possible(layers: list[float], parts: int, last: float) -> None:
    if len(layers) < parts:
        with pytest.raises(ValueError, match="cannot be divided"):
            deal(layers, parts)
        return

    def largest(numbers: list[int]) -> float:
        ends = [0, *itertools.accumulate(numbers)]
        sums = [sum(layers[a:b]) for a, b in itertools.pairwise(ends)]
        return max([*sums[:-1], sums[-1] + last])

    cuts = itertools.combinations(range(1, len(layers)), parts - 1)
    best = min(largest([b - a for a, b in itertools.pairwise([0, *cut, len(layers)])]) for cut in cuts)
    numbers = deal(layers, parts, last)
    assert sum(numbers) == len(layers) and min(numbers) >= 1
    assert largest(numbers) == pytest.approx(best)


def test_the_costs_of_all_stages_add_up_to_the_flops_of_training() -> None:
    """Training takes three times the FLOPs of the forward pass."""
    for config in (CONFIG, DecoderConfig("LLAMA2", 97, 32, 48, 3, 4, 4, 8, windows=(5, 0, 9))):
        stages = split(config, 3, 64)
        assert 3 * sum(costs(config, stages, 64)) == pytest.approx(config.flops_per_token(64), rel=1e-2)  # without norms


def test_the_head_is_counted() -> None:
    assert [len(stage.layers) for stage in split(CONFIG, 2, 64)] == [5, 1]  # its vocabulary is large
    assert head_cost(CONFIG) > 4 * layer_costs(CONFIG, 64)[0]


def test_only_the_chosen_experts_cost_something() -> None:
    experts = DecoderConfig("MIXTRALMOE", 97, 32, 48, 2, 4, 2, 8, experts=Experts(count=8, top_k=2, size=48))
    more = DecoderConfig("MIXTRALMOE", 97, 32, 48, 2, 4, 2, 8, experts=Experts(count=16, top_k=2, size=48))
    assert layer_costs(experts, 64)[0] == pytest.approx(layer_costs(more, 64)[0], rel=0.05)


def test_a_split_by_hand() -> None:
    assert split(CONFIG, 3, 64, [1, 3, 2]) == [
        Stage(range(1), heads=False), Stage(range(1, 4), embeds=False, heads=False), Stage(range(4, 6), embeds=False)
    ]  # fmt: skip


@pytest.mark.parametrize("tied", [False, True])
def test_a_stage_says_which_parameters_it_has(tied: bool) -> None:
    config = DecoderConfig("LLAMA2", 97, 32, 48, 4, 4, 2, 8, tie_embeddings=tied)
    names = [name for name, _ in Decoder(config).named_parameters()]
    for stage in split(config, 3, 64):
        built = {name for name, _ in Decoder(config, stage).named_parameters()}
        assert built - {"embed.weight"} == {name for name in names if stage.has(name)} - {"embed.weight"}


@given(count=st.integers(1, 9), chunks=st.integers(1, 3))
def test_in_a_round_a_rank_has_one_neighbour(count: int, chunks: int) -> None:
    ranks = [n % count for n in range(count * chunks)]
    found = rounds(ranks)
    links = [link for pairs in found for link in pairs]
    assert sorted(links) == sorted({tuple(sorted(pair)) for pair in itertools.pairwise(ranks) if pair[0] != pair[1]})
    assert all(len({*itertools.chain(*pairs)}) == 2 * len(pairs) for pairs in found) and len(found) <= 3
