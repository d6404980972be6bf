"""The head and its cross-entropy in one, a chunk of tokens at a time.

Logits of a whole batch are the largest tensor of a training step (tokens * vocabulary). Here they exist for one chunk:
its loss, and at once the gradients with respect to the hidden states and the head's weight, are computed and the logits
dropped. That needs no recomputation, since the loss is a sum whose outer gradient is one number.

Shapes: T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

IGNORE = -100
CHUNK_BYTES = 64 * 2**20
"""fp32 logits that exist at once."""


def linear_cross_entropy(
    hidden_TD: Tensor, weight_VD: Tensor, labels_T: Tensor, smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of ``hidden @ weight^T`` against ``labels``; labels of -100 count for nothing.

    With smoothing s the target is (1 - s) * one_hot + s / V.

    Returns:
        The sum of the losses (a scalar in fp32, differentiable), and each token's loss (fp32 [T], 0 where ignored,
        for statistics only).
    """
    return _LinearCrossEntropy.apply(hidden_TD, weight_VD, labels_T, smoothing)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, labels: Tensor, smoothing: float):  # type: ignore[override, no-untyped-def]
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        losses = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        # Chunks add up in fp32; a single chunk needs no sum.
        chunk = max(1, min(hidden.shape[0], CHUNK_BYTES // (4 * weight.shape[0])))
        grad_weight = None
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            grad_logits = torch.empty(0)
            losses[part], grad_logits = _chunk(hidden[part], weight, labels[part], smoothing, wants_hidden or wants_weight)
            if grad_hidden is not None:
                torch.mm(grad_logits, weight, out=grad_hidden[part])
            if wants_weight:
                product = grad_logits.t() @ hidden[part]
                grad_weight = product.float() if grad_weight is None else grad_weight.add_(product)
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        ctx.save_for_backward(*(g for g in (grad_hidden, grad_weight) if g is not None))
        ctx.wants = (wants_hidden, wants_weight)
        ctx.mark_non_differentiable(losses)
        return losses.sum(), losses

    @staticmethod
    def backward(ctx, grad_sum: Tensor, _grad_losses: Tensor):  # type: ignore[override, no-untyped-def]
        saved = iter(ctx.saved_tensors)
        grads = [next(saved) if wanted else None for wanted in ctx.wants]
        return (*(g if g is None else g.mul_(grad_sum.to(g.dtype)) for g in grads), None, None)


def _chunk(hidden: Tensor, weight: Tensor, labels: Tensor, smoothing: float, backward: bool) -> tuple[Tensor, Tensor]:
    """Losses of one chunk in fp32, and d loss / d logits in the hidden states' dtype (empty unless ``backward``)."""
    logits = (hidden @ weight.t()).float()
    lse = torch.logsumexp(logits, dim=-1, keepdim=True)
    kept = labels != IGNORE
    index = labels.clamp(min=0).unsqueeze(1)
    losses = (lse - logits.gather(1, index)).squeeze(1)
    if smoothing:
        losses = (1 - smoothing) * losses + smoothing * (lse.squeeze(1) - logits.mean(-1))
    losses = torch.where(kept, losses, 0.0)
    if not backward:
        return losses, hidden.new_empty(0)
    grad = logits.sub_(lse).exp_()
    if smoothing:
        grad.sub_(smoothing / logits.shape[1])
    grad.scatter_add_(1, index, torch.full_like(lse, smoothing - 1.0))
    return losses, grad.mul_(kept.unsqueeze(1)).to(hidden.dtype)
