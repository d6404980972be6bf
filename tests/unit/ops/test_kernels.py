"""Compares the kernels of this machine's devices with formulas in fp64: attention, experts, norm, activation, loss, and the
update of weights."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from internevo import ops
from internevo.ops.accumulate import accumulate
from internevo.ops.adamw import Rates, Shard, adamw
from tests.references import plain_attention

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
EXACT, HALF = 1e-5, 2e-2
"""Largest root mean square error in fp32 and bf16, relative to the root mean square of the result (or to 0.3, if larger)."""
KINDS = [(device, dtype) for device in DEVICES for dtype in (torch.float32, torch.bfloat16)]


def assert_close(mine: Tensor, reference: Tensor, dtype: torch.dtype) -> None:
    assert mine.shape == reference.shape
    difference = mine.detach().cpu().double() - reference
    error, scale = (float(x.detach().square().sum() / max(1, x.numel())) ** 0.5 for x in (difference, reference))
    assert error <= (EXACT if dtype == torch.float32 else HALF) * max(scale, 0.3)


def compare(
    function: Callable[..., Tensor], plain: Callable[..., Tensor], inputs: Sequence[Tensor], device: str, dtype: torch.dtype
) -> None:
    """Compares outputs and gradients of ``function`` on the device with those of ``plain`` in fp64, for the same inputs."""
    mine = [x.to(device, dtype).requires_grad_() for x in inputs]
    exact = [x.detach().cpu().double().requires_grad_() for x in mine]
    out, wanted = function(*mine), plain(*exact)
    assert out.dtype == dtype
    assert_close(out, wanted, dtype)
    outer = torch.randn(wanted.shape)
    out.backward(outer.to(device, dtype))
    wanted.backward(outer.to(dtype).double())
    for x, reference in zip(mine, exact, strict=True):
        assert x.grad is not None
        assert reference.grad is not None
        assert_close(x.grad, reference.grad, dtype)


@pytest.mark.parametrize(("device", "dtype"), KINDS)
@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 999),
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=5),
    heads=st.sampled_from([(4, 4), (4, 2), (3, 1)]),
    size=st.sampled_from([16, 64]),
    window=st.sampled_from([0, 0, 1, 50]),
    alibi=st.booleans(),
    packed=st.booleans(),
    softcap=st.sampled_from([0.0, 0.0, 2.0]),
    part=st.sampled_from([None, None, (0.0, 0.5), (0.3, 0.8), (0.6, 1.0)]),
)
def test_attention(
    device: str,
    dtype: torch.dtype,
    seed: int,
    lengths: list[int],
    heads: tuple[int, int],
    size: int,
    window: int,
    alibi: bool,
    packed: bool,
    softcap: float,
    part: tuple[float, float] | None,
) -> None:
    """Of whole rows, of a packed row, or of ``part`` of the queries of a packed row with the keys up to them."""
    torch.manual_seed(seed)
    count, kv_count = heads
    rows, total = (1, sum(lengths)) if packed else (len(lengths), lengths[0])
    q, k, v = (torch.randn(1, rows * total, n, size) for n in (count, kv_count, kv_count))
    slopes = torch.rand(count) if alibi else None
    queries = slice(0, rows * total)
    if packed and part is not None:
        queries = slice(int(part[0] * total), max(1, int(part[1] * total)))
    boundaries = list(itertools.accumulate(lengths, initial=0)) if packed else [total * row for row in range(rows + 1)]
    on_device: dict[str, Any] = {
        "window": window, "slopes_H": None if slopes is None else slopes.to(device), "softcap": softcap,
    }  # fmt: skip

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if packed:
            cu_seqlens = torch.tensor(boundaries, dtype=torch.int32, device=device)
            q, k, v = q[:, queries], k[:, : queries.stop], v[:, : queries.stop]
            return ops.attention(q, k, v, cu_seqlens, max(lengths), part=part is not None, **on_device)
        q_rows, k_rows, v_rows = (x.view(rows, total, *x.shape[2:]) for x in (q, k, v))
        return ops.attention(q_rows, k_rows, v_rows, **on_device).reshape(q.shape)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return plain_attention(q, k, v, boundaries, window, slopes, softcap)[:, queries]

    compare(attention, plain, (q, k, v), device, dtype)


@pytest.mark.parametrize(("device", "dtype"), KINDS)
@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 999),
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    left=st.sampled_from([0, 7]),
    sizes=st.sampled_from([(16, 32), (24, 8), (9, 5)]),
)
def test_products_of_experts(
    device: str, dtype: torch.dtype, seed: int, counts: list[int], left: int, sizes: tuple[int, int]
) -> None:
    """``left``: the number of rows at the end that belong to no expert."""
    torch.manual_seed(seed)
    ends = list(itertools.accumulate(counts))
    x, weight = torch.randn(ends[-1] + left, sizes[0]), torch.randn(len(counts), sizes[1], sizes[0])
    on_device = torch.tensor(ends, dtype=torch.int32, device=device)

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        parts = [x[a:b] @ w.t() for w, (a, b) in zip(weight, itertools.pairwise([0, *ends]), strict=True)]
        return torch.cat([*parts, x[ends[-1] :] @ weight[0].t() * 0])

    compare(lambda x, w: ops.grouped_linear(x, w, on_device, complete=not left), plain, (x, weight), device, dtype)


@pytest.mark.parametrize(("device", "dtype"), KINDS)
@pytest.mark.parametrize("unit_offset", [False, True])
def test_norm(device: str, dtype: torch.dtype, unit_offset: bool) -> None:
    x, weight = torch.randn(3, 50, 96), torch.randn(96)

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * (weight + unit_offset)

    compare(lambda x, w: ops.rms_norm(x, w, 1e-6, unit_offset), plain, (x, weight), device, dtype)


@pytest.mark.parametrize(("device", "dtype"), KINDS)
@pytest.mark.parametrize(("activation", "plain"), [("silu", F.silu), ("gelu_tanh", lambda x: F.gelu(x, approximate="tanh"))])
def test_gated(device: str, dtype: torch.dtype, activation: str, plain: Callable[..., Tensor]) -> None:
    inputs = torch.randn(4, 33), torch.randn(4, 33)
    compare(lambda g, u: ops.gated(g, u, activation), lambda g, u: plain(g) * u, inputs, device, dtype)


@pytest.mark.parametrize(("device", "dtype"), KINDS)
@pytest.mark.parametrize(("smoothing", "softcap"), [(0.0, 0.0), (0.1, 0.0), (0.1, 0.9)])
def test_loss(device: str, dtype: torch.dtype, smoothing: float, softcap: float) -> None:
    hidden, weight, labels = torch.randn(70, 32), torch.randn(131, 32) / 5, torch.randint(0, 131, (70,))
    labels[::5] = -100
    rounded = [x.to(dtype) for x in (hidden, weight)]
    exact = [x.double().requires_grad_() for x in rounded]
    mine = [x.to(device).requires_grad_() for x in rounded]
    total, losses = ops.linear_cross_entropy(mine[0], mine[1], labels.to(device), smoothing, softcap)
    logits = exact[0] @ exact[1].t()
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    wanted = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
    assert_close(losses, wanted, dtype)
    assert_close(total, wanted.sum(), dtype)
    (total / 56).backward()
    (wanted.sum() / 56).backward()
    for x, reference in zip(mine, exact, strict=True):
        assert x.grad is not None
        assert reference.grad is not None
        assert_close(x.grad, reference.grad, dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_adamw(device: str, dtype: torch.dtype | None) -> None:
    """Two updates of tensors of many sizes, and one that is skipped."""
    draw = torch.Generator().manual_seed(0)
    sizes, lr, decay, eps, beta1, beta2 = [1, 5, 2048, 70_001], 1e-2, 0.1, 1e-8, 0.9, 0.95
    masters = [torch.randn(size, generator=draw) for size in sizes]
    mine = [
        Shard(
            master.to(device),
            torch.empty(0),
            torch.zeros(master.shape, device=device),
            torch.zeros(master.shape, device=device),
            None if dtype is None else torch.zeros(master.shape, dtype=dtype, device=device),
        )
        for master in masters
    ]
    exact = [master.double() for master in masters]
    moments = [[torch.zeros(size, dtype=torch.float64) for size in sizes] for _ in range(2)]
    for step, finite in ((1, 1.0), (2, 0.0), (2, 1.0)):
        gradients = [torch.randn(size, generator=draw) for size in sizes]
        factor = 0.5 if finite else float("nan")
        mine = [shard._replace(gradient=gradient.clone().to(device)) for shard, gradient in zip(mine, gradients, strict=True)]
        adamw(mine, Rates(lr, beta1, beta2, eps, decay, step), *(torch.tensor(x, device=device) for x in (factor, finite)))
        for n, gradient in enumerate(gradients if finite else []):
            first = moments[0][n].lerp_(gradient.double() / 2, 1 - beta1)
            second = moments[1][n].lerp_((gradient.double() / 2).square(), 1 - beta2)
            exact[n] *= 1 - lr * decay
            exact[n] -= lr * (first / (1 - beta1**step)) / ((second / (1 - beta2**step)).sqrt() + eps)
    for shard, master, first, second in zip(mine, exact, *moments, strict=True):
        for tensor, wanted in ((shard.master, master), (shard.first, first), (shard.second, second)):
            torch.testing.assert_close(tensor.cpu().double(), wanted, rtol=1e-5, atol=1e-6)
        assert shard.weight is None or torch.equal(shard.weight, shard.master.to(shard.weight.dtype))


@pytest.mark.parametrize(("device", "dtype"), KINDS)
def test_gradients_are_added_in_fp32(device: str, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    gradients = [torch.randn(5, 1001, generator=draw).to(device, dtype) for _ in range(3)]
    total = accumulate(None, gradients[0].clone())
    assert total.dtype == torch.float32
    for gradient in gradients[1:]:
        assert accumulate(total, gradient) is total
    assert torch.equal(total, gradients[0].float() + gradients[1].float() + gradients[2].float())
