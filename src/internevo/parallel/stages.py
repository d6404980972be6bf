"""Divides the layers of a model among the stages of a pipeline, by their cost.

The cost of a layer is its FLOPs, and that of the head is the FLOPs of its matrix product. The embedding costs nothing: its rows
are only copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, pairwise

from ..models.config import DecoderConfig, Stage


def layer_costs(decoder: DecoderConfig, seq_len: int) -> list[float]:
    """Returns the FLOPs of the forward pass of each layer for one token."""
    heads = 2.0 * decoder.num_heads * (decoder.head_dim + decoder.value_dim)
    weights = (decoder.layer_parameters(layer, active=True) for layer in range(decoder.num_layers))
    return [2.0 * count + heads * decoder.attended(layer, seq_len) for layer, count in enumerate(weights)]


def head_cost(decoder: DecoderConfig) -> float:
    """Returns the FLOPs of the head's forward pass for one token."""
    return 2.0 * decoder.vocab_size * decoder.hidden_size


def costs(decoder: DecoderConfig, stages: Sequence[Stage], seq_len: int) -> list[float]:
    """Returns the FLOPs of the forward pass of each stage for one token."""
    layers = layer_costs(decoder, seq_len)
    return [sum(layers[n] for n in stage.layers) + stage.heads * head_cost(decoder) for stage in stages]


def deal(costs: Sequence[float], parts: int, last: float = 0.0) -> list[int]:
    """Divides layers into consecutive parts so that the largest cost of a part is as small as possible.

    Args:
        costs: the cost of each layer.
        parts: number of parts; each gets at least one layer.
        last: what the last part costs besides its layers.

    Returns:
        The number of layers of each part.

    Raises:
        ValueError: if there are fewer layers than parts.
    """
    count = len(costs)
    if count < parts:
        raise ValueError(f"{count} layers cannot be divided among {parts} stages")
    sums = [0.0, *accumulate(costs)]
    # best[k][n]: the smallest possible largest cost if the first n layers are in k parts; cut[k][n]: where the last one begins.
    best = [[float("inf")] * (count + 1) for _ in range(parts + 1)]
    cut = [[0] * (count + 1) for _ in range(parts + 1)]
    best[0][0] = 0.0
    for k in range(1, parts + 1):
        for n in range(k, count + 1):
            for begin in range(k - 1, n):
                cost = sums[n] - sums[begin] + (last if k == parts else 0.0)
                largest = max(best[k - 1][begin], cost)
                if largest < best[k][n] - 1e-9 * largest:
                    best[k][n], cut[k][n] = largest, begin
    ends = [count]
    for k in range(parts, 0, -1):
        ends.append(cut[k][ends[-1]])
    ends.reverse()
    return [end - begin for begin, end in pairwise(ends)]


def split(decoder: DecoderConfig, count: int, seq_len: int, by_hand: Sequence[int] = ()) -> list[Stage]:
    """Returns the stages of a pipeline, in the order in which a micro-batch goes through them.

    Args:
        count: number of stages on all ranks together.
        seq_len: tokens per row, which the cost of attention depends on.
        by_hand: the number of layers of each stage (``parallel.pipeline.layers``). Empty: by cost.
    """
    return list(cut(tuple(by_hand or deal(layer_costs(decoder, seq_len), count, head_cost(decoder)))))


@lru_cache(maxsize=256)
def cut(numbers: tuple[int, ...]) -> tuple[Stage, ...]:
    """Returns stages with these numbers of layers."""
    ends, last = [0, *accumulate(numbers)], len(numbers) - 1
    return tuple(Stage(range(begin, end), embeds=n == 0, heads=n == last) for n, (begin, end) in enumerate(pairwise(ends)))
