"""Causal attention, over whole rows or over packed documents, with a sliding window or ALiBi where a model has them.

Shapes: B rows, S tokens per row, T = tokens of one packed row, H query heads, K key/value heads, N head size.

- whole rows: PyTorch's scaled dot product attention.
- packed documents on CUDA in half precision: ``torch.nn.attention.varlen`` (flash attention, windows included).
- packed documents elsewhere: one causal attention per document, as one opaque operator, so that a compiled layer
  holds neither a loop over documents nor a graph break. A dense mask takes 3.6 times as long on a CPU.
- a window or ALiBi in PyTorch's kernels is a mask over a block of queries and the keys that they can see.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

_flash_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attention(
    q_BSHN: Tensor,
    k_BSKN: Tensor,
    v_BSKN: Tensor,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int = 0,
    *,
    window: int = 0,
    slopes_H: Tensor | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(N) + bias) v, where a token sees itself and the tokens before it in its row or document.

    Args:
        q_BSHN: queries; ``H`` is a multiple of ``K`` (grouped-query attention, https://arxiv.org/abs/2305.13245).
        k_BSKN, v_BSKN: keys and values. Without ``cu_seqlens`` they may be longer than the queries (a KV cache):
            the queries are then the last tokens.
        cu_seqlens: int32 [documents + 1], the documents' borders in one packed row (B = 1), from 0 to T.
        max_seqlen: an upper bound of a document's length; needed on CUDA with ``cu_seqlens``.
        window: tokens that a token sees, itself included (https://arxiv.org/abs/2004.05150); 0: all before it.
        slopes_H: fp32 [H]; adds slope * (key's position - query's) (ALiBi, https://arxiv.org/abs/2108.12409).

    Returns:
        [B, S, H, N], in the queries' dtype.
    """
    masked = window > 0 or slopes_H is not None
    if cu_seqlens is None and masked and q_BSHN.device.type == "cpu" and q_BSHN.shape[1] == k_BSKN.shape[1]:
        rows, size = q_BSHN.shape[:2]
        borders = torch.arange(0, (rows + 1) * size, size, dtype=torch.int32)
        q, k, v = (x.reshape(1, rows * size, *x.shape[2:]) for x in (q_BSHN, k_BSKN, v_BSKN))
        return attention(q, k, v, borders, window=window, slopes_H=slopes_H).view(q_BSHN.shape)
    if cu_seqlens is None:
        return _rows(q_BSHN, k_BSKN, v_BSKN, window, slopes_H)
    if q_BSHN.is_cuda and q_BSHN.dtype in (torch.float16, torch.bfloat16) and slopes_H is None:
        from torch.nn.attention.varlen import varlen_attn

        out_THN = varlen_attn(  # without return_aux it is one tensor
            q_BSHN[0], k_BSKN[0], v_BSKN[0], cu_seqlens, cu_seqlens, max_seqlen, max_seqlen,
            window_size=(window - 1, 0), enable_gqa=q_BSHN.shape[2] != k_BSKN.shape[2],
        )  # fmt: skip
        assert isinstance(out_THN, Tensor)
        return out_THN.unsqueeze(0)
    if q_BSHN.is_cuda:
        return _documents_cuda(q_BSHN, k_BSKN, v_BSKN, cu_seqlens, window, slopes_H)
    out_THN, _ = torch.ops.internevo.document_attention(q_BSHN[0], k_BSKN[0], v_BSKN[0], cu_seqlens, window, slopes_H)
    return out_THN.unsqueeze(0)


def _rows(q: Tensor, k: Tensor, v: Tensor, window: int, slopes_H: Tensor | None) -> Tensor:
    queries, keys = q.shape[1], k.shape[1]
    # A single token sees everything; a block of new tokens behind a cache needs a mask that is causal from the right.
    mask = None
    if slopes_H is not None or 0 < window < keys or 1 < queries < keys:
        mask = _mask(keys - queries, keys, 0, keys, window, slopes_H, q.device).to(q.dtype)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
        attn_mask=mask, is_causal=mask is None and queries > 1, enable_gqa=q.shape[2] != k.shape[2],
    )  # fmt: skip
    return out.transpose(1, 2)


def _mask(
    first_query: int, last_query: int, first_key: int, last_key: int, window: int, slopes_H: Tensor | None, device: torch.device
) -> Tensor:
    """What is added to the scores, fp32 [1, H or 1, queries, keys]: ALiBi where it is seen, else -inf. Ends are exclusive."""
    queries = torch.arange(first_query, last_query, device=device).unsqueeze(1)
    distance = queries - torch.arange(first_key, last_key, device=device)
    seen = distance >= 0
    if window:
        seen = seen & (distance < window)
    bias = torch.zeros(1, 1, 1, 1, device=device) if slopes_H is None else -slopes_H.view(1, -1, 1, 1) * distance
    return torch.where(seen, bias, -torch.inf)


def _documents_cuda(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: int, slopes_H: Tensor | None) -> Tensor:
    """On CUDA in fp32 or with ALiBi, where no varlen kernel exists: one call per document."""
    borders = cu_seqlens.tolist()
    parts = [_rows(q[:, a:b], k[:, a:b], v[:, a:b], window, slopes_H) for a, b in itertools.pairwise(borders) if b > a]
    return torch.cat(parts, dim=1)


# The CPU operator ----------------------------------------------------------------------------------------------------


PAD = 64
"""In half precision, documents are padded at their end to a multiple of this, where nothing sees the padding. oneDNN makes a
kernel for each length it meets and keeps a thousand of them, about 0.8 GB."""
BLOCK = 256
"""Queries under one mask (a multiple of PAD)."""


def _heads_first(x_THN: Tensor, a: int, b: int) -> Tensor:
    """Tokens ``a`` to ``b`` as [1, H, L, N], padded in half precision."""
    x_HLN = x_THN[a:b].transpose(0, 1)
    missing = -(b - a) % PAD if x_THN.dtype in (torch.float16, torch.bfloat16) else 0
    return (F.pad(x_HLN, (0, 0, 0, missing)) if missing else x_HLN).unsqueeze(0)


def _pieces(cu_seqlens: Tensor, window: int, slopes_H: Tensor | None) -> Iterator[tuple[int, int, int, bool]]:
    """(first key, first query, end of both, whole document): what is computed at once. Keys begin a multiple of PAD before
    the queries, so that both are padded by as much."""
    for a, b in itertools.pairwise(cu_seqlens.tolist()):
        if b > a and slopes_H is None and (window == 0 or b - a <= window):
            yield a, a, b, True
        elif b > a:
            for query in range(a, b, BLOCK):
                seen = max(0, query - a - window + 1) // PAD * PAD if window else 0
                yield a + seen, query, min(query + BLOCK, b), False


def _options(
    piece: tuple[int, int, int, bool], q: Tensor, k: Tensor, window: int, slopes_H: Tensor | None
) -> dict[str, Tensor]:
    """The mask of a piece, padded like its queries ``q`` and keys ``k``."""
    first_key, first_query, _, whole = piece
    if whole:
        return {}
    ends = first_query + q.shape[2], first_key + k.shape[2]
    return {"attn_mask": _mask(first_query, ends[0], first_key, ends[1], window, slopes_H, q.device)}


@torch.library.custom_op("internevo::document_attention", mutates_args=(), device_types="cpu")
def document_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: int, slopes: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Causal attention of each document in a packed row.

    Args:
        q: [T, H, N]. k, v: [T, K, N]. cu_seqlens: [documents + 1]. window, slopes: as in ``attention``.

    Returns:
        The output [T, H, N], and log-sum-exp [T, H] in fp32 for the backward pass.
    """
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    for piece in _pieces(cu_seqlens, window, slopes):
        first, a, b, whole = piece
        queries, keys = _heads_first(q, a, b), _heads_first(k, first, b)
        o, l = _flash_cpu(
            queries, keys, _heads_first(v, first, b), 0.0, whole, **_options(piece, queries, keys, window, slopes)
        )
        out[a:b] = o[0, :, : b - a].transpose(0, 1)
        lse[a:b] = l[0].view(q.shape[1], -1)[:, : b - a].transpose(0, 1)
    return out, lse


@document_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, window: int, slopes: Tensor | None) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


@torch.library.custom_op("internevo::document_attention_backward", mutates_args=(), device_types="cpu")
def document_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, window: int,
    slopes: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of ``document_attention`` with respect to q, k and v."""
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    # Keys are in several pieces when queries come in blocks; their gradients add up in fp32.
    dtype = k.dtype if slopes is None and window == 0 else torch.float32
    dk, dv = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (k, v))
    for piece in _pieces(cu_seqlens, window, slopes):
        first, a, b, whole = piece
        of_queries = [_heads_first(x, a, b) for x in (grad, q, out)]
        of_keys = [_heads_first(x, first, b) for x in (k, v)]
        # The padding's own rows have zero scores and zero gradients: any finite log-sum-exp does.
        lse_HL = F.pad(lse[a:b].transpose(0, 1), (0, of_queries[0].shape[2] - (b - a)))
        g, queries, o = of_queries
        grads = _flash_cpu_backward(
            g, queries, *of_keys, o, lse_HL.unsqueeze(0), 0.0, whole, **_options(piece, queries, of_keys[0], window, slopes)
        )
        dq[a:b] = grads[0][0, :, : b - a].transpose(0, 1)
        dk[first:b] += grads[1][0, :, : b - first].transpose(0, 1)
        dv[first:b] += grads[2][0, :, : b - first].transpose(0, 1)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


@document_attention_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, window: int,
    slopes: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    q, k, v, cu_seqlens, ctx.window, slopes = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens, slopes)


def _backward(ctx, grad: Tensor, _grad_lse: Tensor):  # type: ignore[no-untyped-def]
    q, k, v, out, lse, cu_seqlens, slopes = ctx.saved_tensors
    arguments = (grad, q, k, v, out, lse, cu_seqlens, ctx.window, slopes)
    return (*torch.ops.internevo.document_attention_backward(*arguments), None, None, None)


document_attention.register_autograd(_backward, setup_context=_save)
