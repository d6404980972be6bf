"""Causal attention over whole rows or over packed documents, optionally with a sliding window, ALiBi or capped scores.

Shapes: B rows, S tokens per row, T = tokens of one packed row, H query heads, K key/value heads, N head size.

Which kernel is used:

- whole rows: PyTorch's ``scaled_dot_product_attention``.
- packed documents on CUDA in half precision, without ALiBi and caps: ``torch.nn.attention.varlen`` (flash attention, with
  windows).
- packed documents with a cap on CUDA in half precision, without ALiBi: ``ops.flex`` (FlexAttention), unless a dispatch mode
  watches what runs (it could not see what compiled code does), or nothing is to be compiled, as when text is generated:
  FlexAttention that is not compiled has all scores in memory.
- packed documents otherwise: ``ops.documents``.
- whole rows with a window, ALiBi or a cap: computed as packed documents, one per row.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .compiler import runs_uncompiled
from .documents import capped, mask_of
from .flex import flex_attention


def attention(
    q_BSHN: Tensor,
    k_BSKN: Tensor,
    v_BSKN: Tensor,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int = 0,
    *,
    window: int = 0,
    slopes_H: Tensor | None = None,
    softcap: float = 0.0,
    first_B: Tensor | None = None,
    part: bool = False,
) -> Tensor:
    """Computes softmax(q k^T / sqrt(N) + bias) v. A token attends to itself and to earlier tokens of its row or document.

    Args:
        q_BSHN: queries; ``H`` is a multiple of ``K`` (grouped-query attention, https://arxiv.org/abs/2305.13245).
        k_BSKN, v_BSKN: keys and values. There may be more of them than queries (a KV cache, 2D sequence parallelism); the
            queries are then those of the last tokens.
        cu_seqlens: for one packed row (B = 1): where its documents begin and end, int32 [documents + 1], from 0 to T.
        max_seqlen: upper bound of the length of a document; needed on CUDA with ``cu_seqlens``.
        window: number of tokens that a token attends to, including itself (https://arxiv.org/abs/2004.05150); 0: all.
        slopes_H: fp32 [H]; slope * (position of the key - position of the query) is added to the scores (ALiBi,
            https://arxiv.org/abs/2108.12409).
        softcap: c > 0: scores s become c * tanh(s / c) before the bias is added (Gemma 2, https://arxiv.org/abs/2408.00118,
            section 2). 0: they stay as they are.
        first_B: without ``cu_seqlens``: where each row's text begins, int64 [B]. Before it is padding, which no token of the
            text attends to.
        part: with ``cu_seqlens``: whether the keys are only the first tokens of the row.

    Returns:
        [B, S, H, N], in the queries' dtype.
    """
    masked = window > 0 or slopes_H is not None or softcap > 0
    if cu_seqlens is None and first_B is None and masked and q_BSHN.shape[1] == k_BSKN.shape[1]:
        rows, size = q_BSHN.shape[:2]
        boundaries = torch.arange(0, (rows + 1) * size, size, dtype=torch.int32, device=q_BSHN.device)
        q, k, v = (x.reshape(1, rows * size, *x.shape[2:]) for x in (q_BSHN, k_BSKN, v_BSKN))
        out = attention(q, k, v, boundaries, size, window=window, slopes_H=slopes_H, softcap=softcap)
        return out.view(q_BSHN.shape)
    if cu_seqlens is None:
        return _rows(q_BSHN, k_BSKN, v_BSKN, window, slopes_H, softcap, first_B)
    inputs = q_BSHN.squeeze(0), k_BSKN.squeeze(0), v_BSKN.squeeze(0)  # ``[0]`` would copy gradients
    fast = q_BSHN.is_cuda and q_BSHN.dtype in (torch.float16, torch.bfloat16) and slopes_H is None
    if fast and softcap and (torch.compiler.is_compiling() or not (_is_watched() or runs_uncompiled())):
        return flex_attention(*inputs, cu_seqlens, window, softcap).unsqueeze(0)
    if fast and not softcap:
        from torch.nn.attention.varlen import varlen_attn

        queries, keys = q_BSHN.shape[1], k_BSKN.shape[1]
        cu_seqlens = cu_seqlens.clamp(max=keys) if part else cu_seqlens
        of_queries = cu_seqlens if queries == keys else (cu_seqlens - (keys - queries)).clamp(min=0)
        out_THN = varlen_attn(  # without return_aux, it returns one tensor; causal from the last tokens, as FlashAttention 2.1
            *inputs, of_queries, cu_seqlens, min(max_seqlen, queries), min(max_seqlen, keys),
            window_size=(window - 1, 0), enable_gqa=q_BSHN.shape[2] != k_BSKN.shape[2],
        )  # fmt: skip
        assert isinstance(out_THN, Tensor)
        return out_THN.unsqueeze(0)
    out_THN, _ = torch.ops.internevo.document_attention(*inputs, cu_seqlens, window, slopes_H, softcap)
    return out_THN.unsqueeze(0)


def _is_watched() -> bool:
    from .dispatch import is_watched  # imports much, and only capped scores on CUDA need it

    return is_watched()


def _rows(
    q: Tensor, k: Tensor, v: Tensor, window: int, slopes_H: Tensor | None, softcap: float, first_B: Tensor | None
) -> Tensor:
    queries, keys = q.shape[1], k.shape[1]
    # A single query attends to all keys. Several queries after a cache need a mask that is aligned with the last key.
    mask = None
    if slopes_H is not None or 0 < window < keys or 1 < queries < keys or softcap or first_B is not None:
        mask = mask_of(keys - queries, keys, 0, keys, window, slopes_H, q.device).to(q.dtype)
    if mask is not None and first_B is not None:
        key = torch.arange(keys, device=q.device)
        # Padding attends to itself, because the softmax of nothing is NaN, also in sums in which its weight is 0.
        other = key != torch.arange(keys - queries, keys, device=q.device).unsqueeze(1)
        mask = mask.masked_fill((key < first_B.view(-1, 1, 1, 1)) & other, -torch.inf)
    if softcap and mask is not None:
        return capped(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask, softcap)[0].transpose(1, 2)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
        attn_mask=mask, is_causal=mask is None and queries > 1, enable_gqa=q.shape[2] != k.shape[2],
    )  # fmt: skip
    return out.transpose(1, 2)
