"""Compares grouped matrix products with one product per group."""

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from internevo import ops


@settings(max_examples=20, deadline=None)
@given(
    counts=st.lists(st.integers(0, 5), min_size=1, max_size=5),
    extra=st.integers(0, 3),
    sizes=st.sampled_from([(16, 8), (12, 20)]),
)
def test_grouped_products_equal_one_product_per_group(counts: list[int], extra: int, sizes: tuple[int, int]) -> None:
    rows, (d, f) = sum(counts) + extra, sizes
    x = torch.randn(rows, d, requires_grad=True)
    weight = torch.randn(len(counts), f, d, requires_grad=True)
    ends = torch.tensor(list(itertools.accumulate(counts)), dtype=torch.int32)
    out = ops.grouped_linear(x, weight, ends, complete=extra == 0)
    parts = [x[b - n : b] @ w.T for n, b, w in zip(counts, ends.tolist(), weight, strict=True)]
    wanted = torch.cat([*parts, torch.zeros(extra, f)])
    direction = torch.randn_like(out)
    torch.testing.assert_close(out, wanted)
    for mine, reference in zip(*(torch.autograd.grad(y, (x, weight), direction) for y in (out, wanted)), strict=True):
        torch.testing.assert_close(mine, reference)
