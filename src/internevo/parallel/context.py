"""2D sequence parallelism (``parallel.sequence_2D``): the ranks that share a sequence in isp share heads and queries.

isp alone cannot have more of them than there are heads. Here t = h * c ranks are h head ranks times c context ranks: the
all-to-all of isp is over the h ranks, which then have the tokens of one context rank, of H/h heads each. They gather the keys
and values of these heads over the c ranks (https://arxiv.org/abs/2407.21783, section 3.3.2), and compute attention with their
own queries. With few key/value heads these are a small part of the activations.

A row is divided into 2c chunks, and context rank i has the chunks i and 2c-1-i, so that causal attention is the same work for
all (https://arxiv.org/abs/2311.09431). The queries of a chunk attend to the keys up to its end. The h head ranks of a context
rank share its chunks in order.

Per layer and micro-batch, with K key/value heads (at least h) of N elements, and S tokens:

| group   | forward                                   | backward                                  |
|---------|-------------------------------------------|-------------------------------------------|
| head    | 2 all-to-all: q, k and v; the output      | 2 all-to-all                              |
| context | 1 all-gather of k and v: 2 S N K/h        | 1 reduce-scatter of their gradients: same |

The gathered keys and values are kept for the backward pass, unless attention is recomputed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from .collectives import Group, all_gather, reduce_scatter, tokens_first
from .layout import Layout


class TokenOrder(NamedTuple):
    """Which tokens of a row each rank of a tensor group has. Without context ranks, a row is divided among them in order."""

    heads: int
    """Number of head ranks."""
    contexts: int
    """Number of context ranks."""
    head: int
    """This head rank."""
    context: int
    """This context rank."""
    head_first: bool = True
    """Whether neighbours in the tensor group are head ranks."""

    @classmethod
    def of(cls, layout: Layout, rank: int) -> TokenOrder:
        """Returns that of one rank of a tensor group."""
        its = layout.attention.coordinate(rank)
        return cls(layout.head, layout.context, its["head"], its["context"], layout.head_first)

    def own(self, x_BS: Tensor) -> Tensor:
        """Returns this rank's tokens of every row: [B, S, ...] -> [B, S/t, ...]."""
        return _take(x_BS, self._spans(x_BS.shape[1]))

    def queries(self, x_BS: Tensor) -> Tensor:
        """Returns the tokens of this context rank: [B, S, ...] -> [B, S/c, ...]."""
        return _take(x_BS, self.chunks(x_BS.shape[1]))

    def placed(self, own_BS: Tensor, tokens: int) -> Tensor:
        """Returns rows of ``tokens`` tokens that have this rank's values at its tokens, and zeros elsewhere."""
        spans, whole = self._spans(tokens), own_BS.new_zeros(own_BS.shape[0], tokens, *own_BS.shape[2:])
        for span, values in zip(spans, own_BS.split([span.stop - span.start for span in spans], dim=1), strict=True):
            whole[:, span] = values
        return whole

    def of_ranks(self, x_S: Tensor) -> Tensor:
        """Puts the tokens of all ranks of a tensor group, which were gathered along dimension 0, into the order of the row."""
        if self.contexts > 1 and not self.head_first:
            x_S = x_S.unflatten(0, (self.heads, self.contexts, -1)).transpose(0, 1).flatten(0, 2)
        return self.of_contexts(x_S)

    def of_contexts(self, x_S: Tensor) -> Tensor:
        """Puts the tokens of all context ranks, which were gathered along dimension 0, into the order of the row."""
        return x_S if self.contexts == 1 else _in_order(x_S.unflatten(0, (self.contexts, 2, -1)))

    def chunks(self, tokens: int) -> list[slice]:
        """Returns where the tokens of this context rank are in a row of ``tokens`` tokens."""
        if self.contexts == 1:
            return [slice(0, tokens)]
        size = tokens // (2 * self.contexts)
        return [slice(place * size, (place + 1) * size) for place in (self.context, 2 * self.contexts - 1 - self.context)]

    def _spans(self, tokens: int) -> list[slice]:
        """Returns where this rank's tokens are in a row of ``tokens`` tokens."""
        share, before, found = tokens // (self.heads * self.contexts), 0, list[slice]()
        for chunk in self.chunks(tokens):
            start = chunk.start - before  # of the tokens of the context rank, if all were as this chunk
            first, last = max(self.head * share + start, chunk.start), min((self.head + 1) * share + start, chunk.stop)
            if first < last:
                found.append(slice(first, last))
            before += chunk.stop - chunk.start
        return found


def _in_order(x_c2S: Tensor) -> Tensor:
    """Returns the chunks of all context ranks [contexts, 2, tokens of a chunk, ...] in the order of the row."""
    first, second = x_c2S.unbind(1)
    return torch.cat([*first, *second.unbind()[::-1]])


def _take(x_BS: Tensor, spans: list[slice]) -> Tensor:
    parts = [x_BS[:, span] for span in spans]
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


class _GatherKeys(torch.autograd.Function):
    """Gathers keys and values over the context ranks, for each chunk of queries those up to its end.

    As one function, because autograd would fill up, add, split and reorder the gradients in a pass each.
    """

    @staticmethod
    def forward(ctx, k: Tensor, v: Tensor, order: TokenOrder, group: Group) -> tuple[Tensor, ...]:  # type: ignore[no-untyped-def]
        ctx.order, ctx.group = order, group
        of_ranks = all_gather(torch.stack([tokens_first(x) for x in (k, v)]), group).unflatten(0, (-1, 2)).unbind(1)
        k, v = (_in_order(x.unflatten(1, (2, -1))).transpose(0, 1) for x in of_ranks)
        return tuple(x[:, : chunk.stop] for chunk in order.chunks(k.shape[1]) for x in (k, v))

    @staticmethod
    def backward(ctx, *grads: Tensor):  # type: ignore[no-untyped-def]
        order: TokenOrder = ctx.order
        contexts, here = order.contexts, order.context
        size = grads[0].shape[1] // (here + 1)  # of a chunk
        first, second = ([_by_chunk(x, size) for x in pair] for pair in (grads[:2], grads[2:]))
        nothing = torch.zeros_like(second[0][0])  # for chunks after all queries of this rank
        parts = [
            x[place] if place < len(x) else nothing
            for rank in range(contexts) for x in second for place in (rank, 2 * contexts - 1 - rank)
        ]  # fmt: skip
        whole = torch.stack(parts).unflatten(0, (contexts, 2, 2))
        for place, x in enumerate(first):
            whole[: here + 1, place, 0] += x
        dk, dv = reduce_scatter(whole.flatten(2, 3).flatten(0, 1), ctx.group)
        return dk.transpose(0, 1), dv.transpose(0, 1), None, None


def _by_chunk(x_BSKN: Tensor, size: int) -> Tensor:
    """Returns [chunks, tokens of a chunk, B, K, N]."""
    return x_BSKN.unflatten(1, (-1, size)).movedim(0, 2)


class ContextParallel:
    """Attention with the queries of one context rank."""

    def __init__(self, order: TokenOrder, group: Group) -> None:
        """``group``: the context ranks."""
        self.order, self.group = order, group

    def attention(
        self, q_BSHN: Tensor, k_BSKN: Tensor, v_BSKN: Tensor, cu_seqlens: Tensor | None, max_seqlen: int, **options: Any
    ) -> Tensor:
        """Computes ``ops.attention`` of this rank's queries with the keys and values of all context ranks.

        Args:
            q_BSHN, k_BSKN, v_BSKN: of the tokens of this context rank [B, S/c, ...].
            cu_seqlens, max_seqlen, options: as for ``ops.attention``.
        """
        keys = _GatherKeys.apply(k_BSKN, v_BSKN, self.order, self.group)
        if cu_seqlens is not None:
            return _of_row(q_BSHN, keys, cu_seqlens, max_seqlen, options)
        # A row without boundaries is one document: so kernels for packed rows compute it, which need no mask of all its tokens.
        tokens = self.order.contexts * k_BSKN.shape[1]
        whole = torch.arange(0, 2 * tokens, tokens, dtype=torch.int32, device=q_BSHN.device)
        rows = zip(q_BSHN.split(1), *(x.split(1) for x in keys), strict=True)
        return torch.cat([_of_row(q, its, whole, tokens, options) for q, *its in rows])


def _of_row(q_BSHN: Tensor, keys: Sequence[Tensor], cu_seqlens: Tensor, max_seqlen: int, options: Mapping[str, Any]) -> Tensor:
    """Computes attention of a packed row, one chunk of queries after the other.

    Args:
        keys: the keys and values of the first chunk, and those of the second one.
    """
    chunks = zip(q_BSHN.chunk(2, dim=1), keys[::2], keys[1::2], strict=True)
    return torch.cat([ops.attention(q, k, v, cu_seqlens, max_seqlen, part=True, **options) for q, k, v in chunks], dim=1)
