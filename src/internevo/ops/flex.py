"""Attention with capped scores on CUDA: FlexAttention (https://arxiv.org/abs/2412.05496), which the compiler makes a kernel of.

Shapes: T tokens of a packed row (or fewer queries, of its last tokens), H query heads, K key/value heads, N head size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor


def flex_attention(q_THN: Tensor, k_TKN: Tensor, v_TKN: Tensor, cu_seqlens: Tensor, window: int, softcap: float) -> Tensor:
    """Computes causal attention of each document in a packed row, as ``ops.attention`` does with these arguments [T, H, N].

    On a CPU it is not compiled, and has all scores in memory: this is for tests.
    """
    queries, keys = q_THN.shape[0], k_TKN.shape[0]
    places = torch.arange(keys, device=q_THN.device)
    document = torch.searchsorted(cu_seqlens, places, right=True)
    places = places[keys - queries :]  # of the queries; as a tensor, because kernels with numbers that change may not compile

    def cap(score: Tensor, _row: Tensor, _head: Tensor, _query: Tensor, _key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    def sees(_row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        query = places[query]
        visible = (query >= key) & (document[query] == document[key])
        return visible & (query - key < window) if window else visible

    from torch.nn.attention.flex_attention import create_block_mask as block_mask
    from torch.nn.attention.flex_attention import flex_attention as attend

    if q_THN.is_cuda and not torch.compiler.is_compiling():
        attend, block_mask = _compiled()
    mask = block_mask(sees, None, None, queries, keys, device=q_THN.device)
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q_THN, k_TKN, v_TKN))
    out: Tensor = attend(q, k, v, score_mod=cap, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
    return out[0].transpose(0, 1)


@cache
def _compiled() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Returns FlexAttention, and the function that finds the blocks of scores that a mask leaves, for layers that are not
    compiled."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    return torch.compile(flex_attention), torch.compile(create_block_mask)
