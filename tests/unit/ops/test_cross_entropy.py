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
