"""Causal attention of the documents in a packed row, computed one after the other in one custom operator, so that a compiled
layer contains no loop over documents and no graph break. (One dense mask over the row takes 3.6 times as long on a CPU.)

A document is computed as a whole. With a window, ALiBi or capped scores, or if only its last tokens are queries, it is divided
into blocks of queries, and each block has a mask over the keys that its queries attend to. Kept for the backward pass are q, k,
v, the output, and one number per token and head.

PyTorch's kernels cannot cap scores, so blocks with a cap are computed by their definition (``capped``).

Shapes: T tokens of the row, Q queries (those of its last tokens), H query heads, K key/value heads, N head size, L tokens of a
block, with padding.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten


def mask_of(
    first_query: int, last_query: int, first_key: int, last_key: int, window: int, slopes_H: Tensor | None, device: torch.device
) -> Tensor:
    """Returns what is added to the scores: ALiBi's bias or 0 where a query attends to a key, and -inf elsewhere.

    Args:
        first_query, last_query, first_key, last_key: positions in the row; the last ones are exclusive.
        window, slopes_H: as in ``attention``.

    Returns:
        fp32 [1, H or 1, queries, keys].
    """
    queries = torch.arange(first_query, last_query, device=device).unsqueeze(1)
    distance = queries - torch.arange(first_key, last_key, device=device)
    visible = distance >= 0
    if window:
        visible = visible & (distance < window)
    bias = torch.zeros(1, 1, 1, 1, device=device) if slopes_H is None else -slopes_H.view(1, -1, 1, 1) * distance
    return torch.where(visible, bias, -torch.inf)


PAD = 64
"""In half precision and on CUDA, the ends of documents are padded to a multiple of this; no token attends to the padding.
(oneDNN compiles a kernel for each length and keeps a thousand of them, about 0.8 GB; CUDA's kernel needs aligned masks.)"""
BLOCK = 256
"""Number of queries in a block with a mask; a multiple of PAD."""


def _heads_first(x_THN: Tensor, tokens: slice) -> Tensor:
    """Returns these tokens as [1, H, L, N], padded at the end."""
    x_HLN = x_THN[tokens].transpose(0, 1)
    padded = x_THN.is_cuda or x_THN.dtype in (torch.float16, torch.bfloat16)
    missing = -x_HLN.shape[1] % PAD if padded else 0
    return (F.pad(x_HLN, (0, 0, 0, missing)) if missing else x_HLN).unsqueeze(0)


def _blocks(
    cu_seqlens: Tensor, q: Tensor, k: Tensor, window: int, slopes_H: Tensor | None, softcap: float
) -> Iterator[tuple[int, int, int, bool]]:
    """Yields (first key, first query, end of both, whether it is a whole document) of every block, as positions in the row."""
    keys, first = k.shape[0], k.shape[0] - q.shape[0]
    for a, b in itertools.pairwise(min(end, keys) for end in cu_seqlens.tolist()):
        if b > a >= first and slopes_H is None and not softcap and (window == 0 or b - a <= window):
            yield a, a, b, True
        else:
            for query in range(max(a, first), b, BLOCK):
                skipped = max(0, query - a - window + 1) // PAD * PAD if window else 0
                yield a + skipped, query, min(query + BLOCK, b), False


def _mask(block: tuple[int, int, int, bool], q: Tensor, k: Tensor, window: int, slopes_H: Tensor | None) -> Tensor | None:
    """Returns the mask of a block, for its padded queries ``q`` and keys ``k``; None if it is only causal."""
    first_key, first_query, _, whole = block
    if whole:
        return None
    ends = first_query + q.shape[2], first_key + k.shape[2]
    return mask_of(first_query, ends[0], first_key, ends[1], window, slopes_H, q.device)


# PyTorch's kernels, with the same arguments on every device: [1, H or K, L, N]; without a mask they are causal ---------------


def _kernel(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, softcap: float) -> tuple[Tensor, Tensor]:
    """Returns the output and the log-sum-exp of the scores, fp32 [1, H, L]."""
    if softcap:
        assert mask is not None
        return capped(q, k, v, mask, softcap)
    if not q.is_cuda:
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, mask is None, attn_mask=mask)
        return out, lse.view(q.shape[:3])
    q, k, v = _as_efficient(q, k, v)
    causal = int(mask is None)
    out, lse, *_ = aten._efficient_attention_forward(q, k, v, _bias(mask, q), *[None] * 4, 0.0, causal, compute_log_sumexp=True)
    return out.transpose(1, 2), lse


def _kernel_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None, softcap: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of q, k and v."""
    if softcap:
        assert mask is not None
        return _capped_backward(grad, q, k, v, out, lse, mask, softcap)
    if not q.is_cuda:
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, mask is None, attn_mask=mask
        )
    groups = k.shape[1]
    q, k, v = _as_efficient(q, k, v)
    unused = torch.zeros((), dtype=torch.int64)  # the state of dropout
    dq, *of_keys, _ = aten._efficient_attention_backward(
        grad.transpose(1, 2), q, k, v, _bias(mask, q),
        out.transpose(1, 2).contiguous(),  # in half precision the kernel reads it as if it were contiguous (o_strideM)
        None, None, q.shape[1], k.shape[1], lse.contiguous(), 0.0, unused, unused, int(mask is None), False,
    )  # fmt: skip
    dk, dv = (x.unflatten(2, (groups, -1)).sum(3).transpose(1, 2) for x in of_keys)
    return dq.transpose(1, 2), dk, dv


def _as_efficient(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns q, k and v as [1, L, H, N], as CUDA's memory-efficient kernel needs them (https://arxiv.org/abs/2112.05682)."""
    repeats = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(repeats, dim=1) if repeats > 1 else x for x in (k, v))
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def _bias(mask: Tensor | None, q_1LHN: Tensor) -> Tensor | None:
    """Returns the mask in the queries' dtype, expanded to every head."""
    return None if mask is None else mask.to(q_1LHN.dtype).expand(1, q_1LHN.shape[2], -1, -1)


# Scores with a cap -------------------------------------------------------------------------------------------------------


def capped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, softcap: float) -> tuple[Tensor, Tensor]:
    """Computes attention with capped scores by its definition. The scores are in fp32.

    Args:
        q, k, v: [B, H or K, L, N].
        mask: as from ``mask_of``.
        softcap: as in ``attention``.

    Returns:
        The output, and the log-sum-exp of the scores [B, H, L].
    """
    scores = _capped_scores(q, k, softcap) + _by_group(mask, k)
    lse = scores.logsumexp(-1, keepdim=True)
    out = (scores - lse).exp().to(v.dtype) @ v.unsqueeze(2)
    return out.flatten(1, 2), lse.flatten(1, 2).squeeze(-1)


def _capped_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor, softcap: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of q, k and v. The derivative of c * tanh(s / c) is 1 - tanh(s / c)^2."""
    grad, out, lse, queries = (_by_group(x, k) for x in (grad, out, lse.unsqueeze(-1), q))
    scores = _capped_scores(q, k, softcap)
    probs = (scores + _by_group(mask, k) - lse).exp()
    inner = (grad * out).float().sum(-1, keepdim=True)
    grad_scores = probs * ((grad @ v.unsqueeze(2).transpose(-1, -2)).float() - inner) * (1 - (scores / softcap).square())
    grad_scores = (grad_scores / math.sqrt(q.shape[-1])).to(q.dtype)
    dq = (grad_scores @ k.unsqueeze(2)).flatten(1, 2)
    dk = (grad_scores.transpose(-1, -2) @ queries).sum(2)
    return dq, dk, (probs.to(v.dtype).transpose(-1, -2) @ grad).sum(2)


def _capped_scores(q: Tensor, k: Tensor, softcap: float) -> Tensor:
    """Returns the scores [B, K, H/K, L, keys]."""
    scores = (_by_group(q, k) @ k.unsqueeze(2).transpose(-1, -2)).float()
    return scores.mul_(1 / (math.sqrt(q.shape[-1]) * softcap)).tanh_().mul_(softcap)


def _by_group(x: Tensor, k: Tensor) -> Tensor:
    """Returns [B, H, ...] as [B, K, H/K, ...]; H may be 1."""
    return x.unflatten(1, (k.shape[1], -1)) if x.shape[1] > 1 else x.unsqueeze(1)


# The operator ------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("internevo::document_attention", mutates_args=())
def document_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: int, slopes: Tensor | None, softcap: float
) -> tuple[Tensor, Tensor]:
    """Computes causal attention of each document in a packed row.

    Args:
        q: [Q, H, N].
        k, v: [T, K, N].
        cu_seqlens: int32 [documents + 1]. What is after the last key is left out.
        window, slopes, softcap: as in ``attention``.

    Returns:
        The output [Q, H, N], and the log-sum-exp of the scores, fp32 [Q, H], for the backward pass.
    """
    start = k.shape[0] - q.shape[0]
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    for block in _blocks(cu_seqlens, q, k, window, slopes, softcap):
        first, a, b, _ = block
        its = slice(a - start, b - start)
        queries, keys, values = _heads_first(q, its), _heads_first(k, slice(first, b)), _heads_first(v, slice(first, b))
        o, l = _kernel(queries, keys, values, _mask(block, queries, keys, window, slopes), softcap)
        out[its] = o[0, :, : b - a].transpose(0, 1)
        lse[its] = l[0, :, : b - a].transpose(0, 1)
    return out, lse


@document_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: int, slopes: Tensor | None, softcap: float
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


@torch.library.custom_op("internevo::document_attention_backward", mutates_args=())
def document_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, window: int,
    slopes: Tensor | None, softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Computes the gradients of ``document_attention`` with respect to q, k and v."""
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    start = k.shape[0] - q.shape[0]
    # With blocks of queries, a key belongs to several blocks; its gradients are added in fp32.
    dtype = k.dtype if slopes is None and window == 0 and not softcap and start == 0 else torch.float32
    dk, dv = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (k, v))
    for block in _blocks(cu_seqlens, q, k, window, slopes, softcap):
        first, a, b, _ = block
        its = slice(a - start, b - start)
        g, queries, o = (_heads_first(x, its) for x in (grad, q, out))
        keys, values = (_heads_first(x, slice(first, b)) for x in (k, v))
        # The rows of the padding have zero scores and zero gradients, so any finite log-sum-exp will do.
        l = F.pad(lse[its].transpose(0, 1), (0, queries.shape[2] - (b - a))).unsqueeze(0)
        grads = _kernel_backward(g, queries, keys, values, o, l, _mask(block, queries, keys, window, slopes), softcap)
        dq[its] = grads[0][0, :, : b - a].transpose(0, 1)
        dk[first:b] += grads[1][0, :, : b - first].transpose(0, 1)
        dv[first:b] += grads[2][0, :, : b - first].transpose(0, 1)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


@document_attention_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, window: int,
    slopes: Tensor | None, softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, cu_seqlens, ctx.window, slopes, ctx.softcap = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens, slopes)


def _backward(ctx, grad: Tensor, _grad_lse: Tensor):  # type: ignore[no-untyped-def]
    q, k, v, out, lse, cu_seqlens, slopes = ctx.saved_tensors
    arguments = (grad, q, k, v, out, lse, cu_seqlens, ctx.window, slopes, ctx.softcap)
    return (*torch.ops.internevo.document_attention_backward(*arguments), None, None, None, None)


document_attention.register_autograd(_backward, setup_context=_save)
