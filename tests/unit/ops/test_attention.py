"""Compares attention with its definition: windows, ALiBi, capped scores; packed documents, whole rows, and with a cache."""

import itertools
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
import torch

from internevo import ops
from internevo.ops.compiler import running_uncompiled, runs_uncompiled
from internevo.ops.flex import flex_attention
from tests.references import assert_close_to_scale, plain_attention


@pytest.mark.parametrize("window", [0, 1, 7, 300])
@pytest.mark.parametrize(("alibi", "softcap"), [(False, 0.0), (True, 0.0), (False, 0.8), (True, 2.0)])
def test_attention_equals_the_definition(window: int, alibi: bool, softcap: float) -> None:
    torch.manual_seed(window)
    sizes = [5, 0, 400, 1, 194]  # one is longer than a block of queries, and none is a multiple of a block or of the padding
    boundaries = torch.tensor([0, *itertools.accumulate(sizes)], dtype=torch.int32)
    slopes = torch.tensor([0.5, 0.25, 0.1, 0.01]) if alibi else None
    q, k, v = (torch.randn(1, 600, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    out = ops.attention(q, k, v, boundaries, 512, window=window, slopes_H=slopes, softcap=softcap)
    wanted = plain_attention(q, k, v, boundaries.tolist(), window, slopes, softcap)
    assert_close_to_scale(out, wanted)
    direction = torch.randn_like(out)
    for mine, reference in zip(*(torch.autograd.grad(y, (q, k, v), direction) for y in (out, wanted)), strict=True):
        assert_close_to_scale(mine, reference, 1e-4)
    # Whole rows, and then the last tokens with all keys and values, as with a cache.
    q, k, v = (x.detach().view(2, 300, -1, 8) for x in (q, k, v))
    rows = ops.attention(q, k, v, window=window, slopes_H=slopes, softcap=softcap)
    for row in range(2):
        one = slice(row, row + 1)
        wanted = plain_attention(q[one], k[one], v[one], [0, 300], window, slopes, softcap)
        assert (rows[row] - wanted[0]).abs().max() < 1e-5
    for count in (1, 3):
        last = ops.attention(q[:, -count:], k, v, window=window, slopes_H=slopes, softcap=softcap)
        assert (last - rows[:, -count:]).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("window", "alibi", "softcap"), [(0, False, 0.0), (7, False, 0.0), (300, True, 0.0), (0, False, 0.8)])
@pytest.mark.parametrize("first", [0, 3, 5, 200, 405, 599])
def test_queries_of_the_last_tokens_of_a_packed_row_are_those_of_all(
    first: int, window: int, alibi: bool, softcap: float, dtype: torch.dtype
) -> None:
    """As a rank of 2D sequence parallelism has them; wherever they begin in a document."""
    torch.manual_seed(first)
    boundaries = torch.tensor([0, *itertools.accumulate([5, 0, 400, 1, 194])], dtype=torch.int32)
    slopes = torch.tensor([0.5, 0.25, 0.1, 0.01]) if alibi else None
    q, k, v, direction = (torch.randn(1, 600, heads, 8, dtype=dtype) for heads in (4, 2, 2, 4))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    direction[:, :first] = 0
    wanted = plain_attention(q.float(), k.float(), v.float(), boundaries.tolist(), window, slopes, softcap)
    out = ops.attention(q[:, first:], k, v, boundaries, 512, window=window, slopes_H=slopes, softcap=softcap)
    precision = 1e-5 if dtype == torch.float32 else 2e-2
    assert_close_to_scale(out.float(), wanted[:, first:], precision)
    mine = torch.autograd.grad(out, (q, k, v), direction[:, first:])
    for found, reference in zip(mine, torch.autograd.grad(wanted, (q, k, v), direction.float()), strict=True):
        assert_close_to_scale(found.float(), reference.float(), 10 * precision if precision < 1e-2 else precision)


@pytest.mark.parametrize("first", [0, 17, 31])
@pytest.mark.parametrize("window", [0, 9])
def test_flex_attention_equals_the_other_path(window: int, first: int) -> None:
    """The forward pass of what GPUs compile. (On a CPU it has no backward pass; ``test_kernels`` compares that on GPUs.)"""
    torch.manual_seed(window)
    boundaries = torch.tensor([0, 30, 31, 31, 100], dtype=torch.int32)
    q, k, v = (torch.randn(100, heads, 16) for heads in (4, 2, 2))
    out = flex_attention(q[first:], k, v, boundaries, window, 0.8)
    wanted = ops.attention(q[None], k[None], v[None], boundaries, window=window, softcap=0.8)[0, first:]
    assert_close_to_scale(out, wanted)


def test_nothing_is_to_be_compiled_while_text_is_generated() -> None:
    """FlexAttention that isn't compiled has all scores in memory, so that capped scores of a prompt are computed otherwise."""
    import torch._dynamo

    assert not runs_uncompiled()
    with torch.no_grad():
        assert not runs_uncompiled(), "an evaluation of compiled layers"
    with running_uncompiled():
        with suppress(KeyError), running_uncompiled():
            raise KeyError
        assert runs_uncompiled() and ThreadPoolExecutor(1).submit(runs_uncompiled).result(), "backward passes have threads"
    assert not runs_uncompiled() and torch._dynamo is not None


def test_before_the_compiler_is_imported_only_training_is_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch._dynamo.eval_frame", raising=False)
    assert not runs_uncompiled()
    with torch.no_grad():
        assert runs_uncompiled()
    assert not runs_uncompiled()
