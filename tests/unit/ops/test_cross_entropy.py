"""Compares the chunked cross-entropy of a linear head with PyTorch's cross-entropy."""

import pytest
import torch
from torch import Tensor

from internevo.ops import cross_entropy


def plain(logits: Tensor, labels: Tensor, smoothing: float, softcap: float) -> Tensor:
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    return torch.nn.functional.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)


@pytest.mark.parametrize("softcap", [0.0, 0.7])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("chunk_tokens", [1, 3, 100])
def test_chunked_loss_equals_pytorch(
    monkeypatch: pytest.MonkeyPatch, smoothing: float, chunk_tokens: int, softcap: float
) -> None:
    monkeypatch.setitem(cross_entropy.CHUNK_BYTES, "cpu", 4 * 31 * chunk_tokens)
    monkeypatch.setattr(cross_entropy, "BLOCK", 7)
    torch.manual_seed(0)
    hidden = torch.randn(10, 8, requires_grad=True)
    weight = torch.randn(31, 8, requires_grad=True)
    labels = torch.randint(0, 31, (10,))
    labels[2] = labels[7] = -100
    total, losses = cross_entropy.linear_cross_entropy(hidden, weight, labels, smoothing, softcap)
    wanted = plain(hidden @ weight.t(), labels, smoothing, softcap)
    torch.testing.assert_close(total, wanted)
    assert losses[2] == 0 and losses[7] == 0
    grads = torch.autograd.grad(total * 0.3, (hidden, weight))
    for mine, reference in zip(grads, torch.autograd.grad(wanted * 0.3, (hidden, weight)), strict=True):
        torch.testing.assert_close(mine, reference, atol=1e-6, rtol=1e-5)


def test_gradients_in_half_precision_are_scaled_in_fp32() -> None:
    """By a number of tokens that bf16 does not have: a factor that is rounded makes all gradients too large by 0.2%."""
    torch.manual_seed(0)
    hidden = torch.randn(200, 64).bfloat16().requires_grad_()
    weight = torch.randn(5000, 64).bfloat16().requires_grad_()
    labels = torch.randint(0, 5000, (200,))
    total, _ = cross_entropy.linear_cross_entropy(hidden, weight, labels)
    grads = torch.autograd.grad(total / 98_304, (hidden, weight))
    wanted = torch.autograd.grad(plain(hidden.float() @ weight.float().t(), labels, 0, 0) / 98_304, (hidden, weight))
    for mine, reference in zip(grads, wanted, strict=True):
        projection = (mine.double() * reference.double()).sum() / reference.double().square().sum()
        assert abs(projection - 1) < 5e-4


@pytest.mark.parametrize(("shards", "smoothing", "softcap"), [(1, 0.1, 0.7), (2, 0.0, 0.0)])
def test_compiled_halves_compute_the_same(shards: int, smoothing: float, softcap: float) -> None:
    """What CUDA runs: the halves of the softmax, with what ranks exchange between them. Here, the other rank has no rows."""
    torch.manual_seed(0)
    logits, labels = torch.randn(10, 31), torch.randint(0, 31, (10,))
    labels[3] = -100

    def gather(sums: Tensor) -> Tensor:
        nothing = torch.stack([torch.full_like(sums[0], -torch.inf), *torch.zeros_like(sums[1:])])
        return torch.stack([sums, nothing])

    shard = cross_entropy.VocabShard(0, 31, gather) if shards > 1 else None
    wanted = cross_entropy._softmax(logits.clone(), labels, smoothing, softcap, shard)
    begin, end = (cross_entropy._compiled(half) for half in (cross_entropy._begin_softmax, cross_entropy._end_softmax))
    sums, parts = begin(logits.clone(), labels, smoothing, softcap, 0, 31)
    found = end(sums, parts, labels, smoothing, 0, 31, torch.float32)
    whole = cross_entropy._compiled(cross_entropy._whole_softmax)(logits.clone(), labels, smoothing, softcap)
    for mine in (found, whole):
        torch.testing.assert_close(mine, wanted)
