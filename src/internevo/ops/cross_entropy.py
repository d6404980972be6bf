"""The head and the cross-entropy in one function, which computes one chunk of tokens at a time.

The logits of a whole micro-batch would be the largest tensor of a training step (tokens * vocabulary). Here, logits exist only
for one chunk of tokens: its loss and the gradients with respect to the hidden states and the head's weight are computed
together, and then its logits are freed. Nothing is recomputed in the backward pass: the result is one number, the sum of the
losses, so the backward pass only multiplies these gradients by the gradient of that number.

Shapes: T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

IGNORE = -100
CHUNK_BYTES = {"cpu": 24 * 2**20, "cuda": 512 * 2**20}
"""Bytes of the fp32 logits of one chunk, by device type. They are enough to use the whole device; on a CPU they are few enough
that the C library keeps the memory for the next chunk."""
BLOCK = 4096
"""Number of rows of the head's weight whose gradient is computed at once on a CPU."""


def chunk_tokens(tokens: int, rows: int, device_type: str = "cpu") -> int:
    """Returns the number of tokens in a chunk; the chunks have about the same size.

    Args:
        tokens: number of all tokens.
        rows: number of logits of each token.
    """
    limit = CHUNK_BYTES.get(device_type, CHUNK_BYTES["cpu"])
    chunks = -(-tokens // max(1, limit // (4 * rows)))
    return -(-tokens // max(chunks, 1))


class VocabShard(NamedTuple):
    """The rows of the head's weight that this rank has, if the head is sharded along the vocabulary."""

    first: int
    """The number of the first of these rows in the full weight."""
    vocabulary: int
    """The number of rows of the full weight."""
    gather: Callable[[Tensor], Tensor]
    """Gathers a tensor [...] of every rank into [ranks, ...]."""


def linear_cross_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    smoothing: float = 0.0,
    softcap: float = 0.0,
    shard: VocabShard | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes the cross-entropy of the logits ``hidden @ weight^T`` and ``labels``. Tokens with label -100 are ignored.

    Args:
        hidden_TD: hidden states of the tokens.
        weight_VD: weight of the head.
        labels_T: ids of the next tokens, int64, or -100.
        smoothing: label smoothing s: the target distribution is (1 - s) * one_hot + s / V.
        softcap: c > 0: logits z become c * tanh(z / c) (Gemma 2, https://arxiv.org/abs/2408.00118). 0: they stay as they are.
        shard: if it is given, ``weight`` has only these rows. Every rank still computes the losses over the whole vocabulary;
            the gradient of ``hidden`` is this rank's summand, and the sum over the ranks is the full gradient.

    Returns:
        The sum of the losses (a scalar in fp32, differentiable), and the loss of each token (fp32 [T], 0 for ignored tokens,
        not differentiable).
    """
    return _LinearCrossEntropy.apply(hidden_TD, weight_VD, labels_T, smoothing, softcap, shard)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, hidden: Tensor, weight: Tensor, labels: Tensor, smoothing: float, softcap: float, shard: VocabShard | None
    ):
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        losses = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        chunk = chunk_tokens(hidden.shape[0], weight.shape[0], hidden.device.type)
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            losses[part], grad_logits = _softmax(hidden[part] @ weight.t(), labels[part], smoothing, softcap, shard)
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[part])
            if grad_weight is not None:
                _add_product(grad_weight, grad_logits, hidden[part])
            del grad_logits  # before the next chunk's logits are there
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        ctx.save_for_backward(*(g for g in (grad_hidden, grad_weight) if g is not None))
        ctx.wants = (wants_hidden, wants_weight)
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    def backward(ctx, grad_sum: Tensor, _grad_losses: Tensor):  # type: ignore[no-untyped-def]
        saved = iter(ctx.saved_tensors)
        grads = [next(saved) if wanted else None for wanted in ctx.wants]
        for grad in grads:
            if grad is not None:
                _scale(grad, grad_sum)
        return (*grads, None, None, None, None)


def _add_product(total_VD: Tensor, grad_TV: Tensor, hidden_TD: Tensor) -> None:
    """Adds grad^T hidden to ``total_VD``; the sums are in fp32."""
    if total_VD.is_cuda and hidden_TD.dtype != torch.float32:
        total_VD += torch.mm(grad_TV.t(), hidden_TD, out_dtype=torch.float32)
        return
    # On a CPU in blocks of rows, so that each product is added while it is in the cache.
    block = BLOCK if not total_VD.is_cuda else total_VD.shape[0]
    for first in range(0, total_VD.shape[0], block):
        rows = slice(first, first + block)
        total_VD[rows] += grad_TV[:, rows].t() @ hidden_TD


def _scale(grad: Tensor, factor: Tensor) -> None:
    """Multiplies a gradient in place, in fp32. (A factor without dimensions would be rounded to the gradient's dtype.)"""
    for rows in grad.split(BLOCK if not grad.is_cuda else grad.shape[0]):
        rows.mul_(factor.view(1))


def _softmax(
    logits: Tensor, labels: Tensor, smoothing: float, softcap: float, shard: VocabShard | None
) -> tuple[Tensor, Tensor]:
    """Returns the losses in fp32 and the gradients of the logits in the logits' dtype.

    On CUDA it is compiled, and then reads the logits two or three times and not ten. What ranks exchange is not compiled.
    """
    if logits.is_cuda and shard is None:
        return _compiled(_whole_softmax)(logits, labels, smoothing, softcap)
    halves: tuple[Callable[..., Any], ...] = (_begin_softmax, _end_softmax)
    begin, end = map(_compiled, halves) if logits.is_cuda else halves
    first, vocabulary = (shard.first, shard.vocabulary) if shard else (0, logits.shape[1])
    dtype = logits.dtype
    sums, parts = begin(logits, labels, smoothing, softcap, first, vocabulary)
    del logits  # before the gradients are there
    if shard:
        lses, targets, means = shard.gather(sums).unbind(1)
        sums = torch.stack([lses.logsumexp(0), targets.sum(0), means.sum(0)])
    return end(sums, parts, labels, smoothing, first, vocabulary, dtype)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


def _whole_softmax(logits: Tensor, labels: Tensor, smoothing: float, softcap: float) -> tuple[Tensor, Tensor]:
    vocabulary = logits.shape[1]
    sums, parts = _begin_softmax(logits, labels, smoothing, softcap, 0, vocabulary)
    return _end_softmax(sums, parts, labels, smoothing, 0, vocabulary, logits.dtype)


class _Parts(NamedTuple):
    """What the first half of the softmax hands to the second."""

    exponentials: Tensor
    """exp(logit - largest), fp32 [T, rows]."""
    largest: Tensor
    """[T, 1]."""
    slope: Tensor | None
    """With a cap: its derivative 1 - tanh(z / c)^2, fp32 [T, rows]."""


def _begin_softmax(
    logits: Tensor, labels: Tensor, smoothing: float, softcap: float, first: int, vocabulary: int
) -> tuple[Tensor, _Parts]:
    """Returns [3, T, 1] of these rows (log-sum-exp, the target's logit, the sum of the logits over the vocabulary's size), and
    what is needed for the gradients.

    Not compiled, logits, exponentials, probabilities and gradients are in the same fp32 buffer, one after the other.
    """
    logits, slope = logits.float(), None
    if softcap:
        logits = logits.div_(softcap).tanh_()
        slope = 1 - logits.square()
        logits.mul_(softcap)
    index, here = _place_of(labels, first, logits.shape[1])
    target = torch.where(here, logits.gather(1, index), 0.0)
    largest = logits.amax(-1, keepdim=True)
    mean = logits.sum(-1, keepdim=True) / vocabulary if smoothing else target
    total = logits.sub_(largest).exp_().sum(-1, keepdim=True)
    return torch.stack([largest + total.log(), target, mean]), _Parts(logits, largest, slope)


def _end_softmax(
    sums: Tensor, parts: _Parts, labels: Tensor, smoothing: float, first: int, vocabulary: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Returns the losses, and the gradients of the logits of these rows.

    Args:
        sums: those of the whole vocabulary, as ``_begin_softmax`` returns them.
    """
    lse, target, mean = sums
    losses = lse - ((1 - smoothing) * target + smoothing * mean)
    kept, share = labels != IGNORE, (parts.largest - lse).exp()
    index, here = _place_of(labels, first, parts.exponentials.shape[1])
    if torch.compiler.is_compiling():  # one kernel, which writes nothing in fp32
        columns = torch.arange(parts.exponentials.shape[1], device=labels.device)
        wanted = torch.where((columns == index) & here, 1.0 - smoothing, 0.0)
        grad = parts.exponentials * share - smoothing / vocabulary - wanted
        grad = (grad if parts.slope is None else grad * parts.slope) * kept.unsqueeze(1)
    else:
        grad = parts.exponentials.mul_(share)
        if smoothing:
            grad.sub_(smoothing / vocabulary)
        grad.scatter_add_(1, index, torch.where(here, smoothing - 1.0, 0.0))
        if parts.slope is not None:
            grad.mul_(parts.slope)
        grad.mul_(kept.unsqueeze(1))
    return torch.where(kept, losses.squeeze(1), 0.0), grad.to(dtype)


def _place_of(labels: Tensor, first: int, rows: int) -> tuple[Tensor, Tensor]:
    """Returns the column of each label among these rows of the vocabulary [T, 1], and whether it is one of them."""
    index = (labels - first).unsqueeze(1)
    here = (labels != IGNORE).unsqueeze(1) & (index >= 0) & (index < rows)
    return index.clamp(0, rows - 1), here
