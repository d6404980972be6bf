"""Causal attention, over whole rows or over packed documents.

Shapes: B rows, S tokens per row, T = tokens of one packed row, H query heads, K key/value heads, N head size.

- whole rows: PyTorch's scaled dot product attention.
- packed documents on CUDA in half precision: ``torch.nn.attention.varlen`` (flash attention).
- packed documents elsewhere: one causal attention per document, as one opaque operator, so that a compiled layer
  holds neither a loop over documents nor a graph break. A dense mask takes 3.6 times as long on a CPU.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

_flash_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attention(q_BSHN: Tensor, k_BSKN: Tensor, v_BSKN: Tensor, cu_seqlens: Tensor | None = None, max_seqlen: int = 0) -> Tensor:
    """softmax(q k^T / sqrt(N)) v, where a token sees itself and the tokens before it in its row or document.

    Args:
        q_BSHN: queries; ``H`` is a multiple of ``K`` (grouped-query attention, https://arxiv.org/abs/2305.13245).
        k_BSKN, v_BSKN: keys and values. Without ``cu_seqlens`` they may be longer than the queries (a KV cache):
            the queries are then the last tokens.
        cu_seqlens: int32 [documents + 1], the documents' borders in one packed row (B = 1), from 0 to T.
        max_seqlen: an upper bound of a document's length; needed on CUDA with ``cu_seqlens``.

    Returns:
        [B, S, H, N], in the queries' dtype.
    """
    if cu_seqlens is None:
        return _rows(q_BSHN, k_BSKN, v_BSKN)
    if q_BSHN.is_cuda and q_BSHN.dtype in (torch.float16, torch.bfloat16):
        from torch.nn.attention.varlen import varlen_attn

        out_THN = varlen_attn(  # without return_aux it is one tensor
            q_BSHN[0], k_BSKN[0], v_BSKN[0], cu_seqlens, cu_seqlens, max_seqlen, max_seqlen,
            window_size=(-1, 0), enable_gqa=q_BSHN.shape[2] != k_BSKN.shape[2],
        )  # fmt: skip
        assert isinstance(out_THN, Tensor)
        return out_THN.unsqueeze(0)
    if q_BSHN.is_cuda:
        return _documents_cuda(q_BSHN, k_BSKN, v_BSKN, cu_seqlens)
    out_THN, _ = torch.ops.internevo.document_attention(q_BSHN[0], k_BSKN[0], v_BSKN[0], cu_seqlens)
    return out_THN.unsqueeze(0)


def _rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    queries, keys = q.shape[1], k.shape[1]
    # A block of new tokens behind a cache needs a mask that is causal from the right; a single token sees everything.
    mask = None
    if 1 < queries < keys:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
        attn_mask=mask, is_causal=queries == keys and queries > 1, enable_gqa=q.shape[2] != k.shape[2],
    )  # fmt: skip
    return out.transpose(1, 2)


def _documents_cuda(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """fp32 on CUDA, where no varlen kernel exists: one call per document."""
    borders = cu_seqlens.tolist()
    parts = [_rows(q[:, a:b], k[:, a:b], v[:, a:b]) for a, b in itertools.pairwise(borders) if b > a]
    return torch.cat(parts, dim=1)


# The CPU operator ----------------------------------------------------------------------------------------------------


PAD = 64
"""In half precision, documents are padded at their end to a multiple of this, where nothing sees the padding. oneDNN makes a
kernel for each length it meets and keeps a thousand of them, about 0.8 GB."""


def _heads_first(x_THN: Tensor, a: int, b: int) -> Tensor:
    """Tokens ``a`` to ``b`` as [1, H, L, N], padded in half precision."""
    x_HLN = x_THN[a:b].transpose(0, 1)
    missing = -(b - a) % PAD if x_THN.dtype in (torch.float16, torch.bfloat16) else 0
    return (F.pad(x_HLN, (0, 0, 0, missing)) if missing else x_HLN).unsqueeze(0)


@torch.library.custom_op("internevo::document_attention", mutates_args=(), device_types="cpu")
def document_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Causal attention of each document in a packed row.

    Args:
        q: [T, H, N]. k, v: [T, K, N]. cu_seqlens: [documents + 1].

    Returns:
        The output [T, H, N], and log-sum-exp [T, H] in fp32 for the backward pass.
    """
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    borders = cu_seqlens.tolist()
    for a, b in itertools.pairwise(borders):
        if b > a:
            o, l = _flash_cpu(_heads_first(q, a, b), _heads_first(k, a, b), _heads_first(v, a, b), 0.0, True)
            out[a:b] = o[0, :, : b - a].transpose(0, 1)
            lse[a:b] = l[0].view(q.shape[1], -1)[:, : b - a].transpose(0, 1)
    return out, lse


@document_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


@torch.library.custom_op("internevo::document_attention_backward", mutates_args=(), device_types="cpu")
def document_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``document_attention`` with respect to q, k and v."""
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    borders = cu_seqlens.tolist()
    for a, b in itertools.pairwise(borders):
        if b > a:
            parts = [_heads_first(x, a, b) for x in (grad, q, k, v, out)]
            # The padding's own rows have zero scores and zero gradients: any finite log-sum-exp does.
            lse_HL = F.pad(lse[a:b].transpose(0, 1), (0, parts[0].shape[2] - (b - a)))
            grads = _flash_cpu_backward(*parts, lse_HL.unsqueeze(0), 0.0, True)
            for target, g in zip((dq, dk, dv), grads, strict=True):
                target[a:b] = g[0, :, : b - a].transpose(0, 1)
    return dq, dk, dv


@document_attention_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, cu_seqlens = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens)


def _backward(ctx, grad: Tensor, _grad_lse: Tensor):  # type: ignore[no-untyped-def]
    q, k, v, out, lse, cu_seqlens = ctx.saved_tensors
    return (*torch.ops.internevo.document_attention_backward(grad, q, k, v, out, lse, cu_seqlens), None)


document_attention.register_autograd(_backward, setup_context=_save)
