"""2D sequence parallelism: which tokens each rank has, and the rules of its config."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from internevo.config import validate
from internevo.config.axes import context_size, head_size
from internevo.parallel.context import TokenOrder
from internevo.parallel.layout import Layout
from internevo.train.check import problems
from tests.conftest import tiny


@st.composite
def orders(draw: st.DrawFn) -> tuple[list[TokenOrder], int]:
    """Those of all ranks of a tensor group, and a number of tokens that they can share."""
    heads, contexts = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    tensor = heads * contexts
    layout = Layout(2 * tensor, tensor, "isp", 1, 1, 1, False, context=contexts, head_first=draw(st.booleans()))
    return [TokenOrder.of(layout, rank) for rank in range(tensor)], 2 * tensor * draw(st.integers(1, 3))


@given(orders())
def test_the_ranks_of_a_tensor_group_share_the_tokens_of_a_row(case: tuple[list[TokenOrder], int]) -> None:
    ranks, tokens = case
    row = torch.arange(2 * tokens).view(2, tokens)
    parts = [rank.own(row) for rank in ranks]
    assert {part.shape for part in parts} == {(2, tokens // len(ranks))}
    gathered = torch.cat([part.transpose(0, 1) for part in parts])
    assert all(torch.equal(rank.of_ranks(gathered).transpose(0, 1), row) for rank in ranks)
    placed = [rank.placed(part, tokens) for rank, part in zip(ranks, parts, strict=True)]
    assert torch.equal(torch.stack(placed).sum(0), row)


@given(orders())
def test_head_ranks_together_have_the_queries_of_their_context_rank(case: tuple[list[TokenOrder], int]) -> None:
    ranks, tokens = case
    row = torch.arange(tokens).view(1, tokens)
    by_context = {n: sorted((r for r in ranks if r.context == n), key=lambda r: r.head) for n in range(ranks[0].contexts)}
    for its in by_context.values():
        assert torch.equal(torch.cat([rank.own(row) for rank in its], dim=1), its[0].queries(row))
    gathered = torch.cat([its[0].queries(row)[0] for its in by_context.values()])
    assert torch.equal(ranks[0].of_contexts(gathered), row[0])
    # In a row of one document, each context rank has the same number of scores.
    scores = {sum(int(q) + 1 for q in its[0].queries(row)[0]) for its in by_context.values()}
    assert len(scores) == 1


def test_neighbours() -> None:
    sizes = {True: [[0, 1], [2, 3], [4, 5], [6, 7]], False: [[0, 4], [1, 5], [2, 6], [3, 7]]}
    for head_first, groups in sizes.items():
        layout = Layout(8, 8, "isp", 1, 1, 1, False, context=4, head_first=head_first)
        assert layout.groups()["head"] == groups and layout.sizes()["context"] == 4
        assert layout.groups()["context"] == [list(ranks) for ranks in zip(*groups, strict=True)]
        assert layout.axis_of("all-to-all", groups[0]) == "head"


def two_d(mode: str = "isp", size: int = 4, **sequence: Any) -> dict[str, Any]:
    return {"parallel": {"tensor": {"size": size, "mode": mode}, "sequence_2D": {"enable": True, **sequence}}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (two_d("msp", head_size=2, context_size=2), "sequence_2D.enable = True needs parallel.tensor.mode = 'isp', not 'msp'"),
        (two_d(head_size=2), "head_size * context_size = 2 * 1 must be parallel.tensor.size = 4"),
        (two_d(context_size=8), "head_size * context_size = 1 * 8 must be parallel.tensor.size = 4"),
        ({**two_d(context_size=4), "data__seq_len": 36}, "is not divisible by 2 * parallel.sequence_2D.context_size = 8"),
        (
            two_d(size=6, head_size=3, context_size=2),
            "model.num_attention_heads = 4 is not divisible by parallel.sequence_2D.head",
        ),
        ({"parallel": {"tensor": {"size": 8, "mode": "isp"}}}, "parallel.sequence_2D is for more ranks than heads"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, Any], message: str) -> None:
    config = validate(tiny(**{"data__seq_len": 96, **changes}))
    assert any(message in line for line in problems(config, config.parallel.tensor.size))


def test_more_ranks_than_heads() -> None:
    config = validate(tiny(**two_d(size=16, head_size=2, context_size=8)))
    assert config.model.num_attention_heads == 4 and not problems(config, 16)
    assert (head_size(config), context_size(config)) == (2, 8)
    layout = Layout.from_config(config, 16)
    ends = itertools.chain(*(TokenOrder.of(layout, rank).chunks(32) for rank in range(0, 16, 2)))
    assert sorted(chunk.start for chunk in ends) == list(range(0, 32, 2))
