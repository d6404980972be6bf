"""Log-likelihoods of texts after other texts, in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..models.generate import LanguageModel, empty_caches, inference


class Scored(NamedTuple):
    """A span of ids and what the model sees before it."""

    ids: list[int]
    """What comes before, at least one id, and the span."""
    predicted: int
    """Number of ids in the span."""


class LogLikelihood(NamedTuple):
    """How likely a span is."""

    value: float
    """The sum of the logarithms of the probabilities of its ids."""
    is_greedy: bool
    """Whether each id is the most likely one."""


@torch.no_grad()
def log_likelihoods(
    model: LanguageModel, spans: Sequence[Scored], tokens_at_once: int, rows_at_once: int, dtype: torch.dtype | None
) -> list[LogLikelihood]:
    """Computes the log-likelihood of each span. Spans of similar lengths are computed together.

    Args:
        spans: one without ids is certain: 0, and the most likely one.
        tokens_at_once, rows_at_once: the largest size of a batch, with its padding. (Its logits are in memory at once.)
        dtype: as for ``Continuation``.
    """
    found: list[LogLikelihood | None] = [None if span.predicted else LogLikelihood(0.0, True) for span in spans]
    order = sorted((number for number, span in enumerate(spans) if span.predicted), key=lambda number: -len(spans[number].ids))
    while order:
        longest = len(spans[order[0]].ids) - 1
        size = max(1, min(rows_at_once, tokens_at_once // max(1, longest)))
        batch, order = order[:size], order[size:]
        for number, result in zip(batch, _batch(model, [spans[number] for number in batch], longest, dtype), strict=True):
            found[number] = result
    return [result for result in found if result is not None]


def _batch(model: LanguageModel, spans: Sequence[Scored], length: int, dtype: torch.dtype | None) -> Iterator[LogLikelihood]:
    weight = next(model.parameters())
    rows = [span.ids[:-1] + [0] * (length - len(span.ids) + 1) for span in spans]  # no token attends to what is after it
    tokens = torch.tensor(rows, device=weight.device)
    caches = empty_caches(model, length, dtype or weight.dtype, weight.device, len(rows))
    with inference(model):
        logits_BSV = model(tokens, caches=caches)
    for span, logits_SV in zip(spans, logits_BSV, strict=True):
        end = len(span.ids) - 1
        yield _score(
            logits_SV[end - span.predicted : end].float(), torch.tensor(span.ids[-span.predicted :], device=weight.device)
        )


def _score(logits_SV: Tensor, ids_S: Tensor) -> LogLikelihood:
    chosen_S = logits_SV.log_softmax(-1).gather(1, ids_S.unsqueeze(1))
    return LogLikelihood(float(chosen_S.double().sum()), bool((logits_SV.argmax(-1) == ids_S).all()))


def windows(prefix: int, ids: Sequence[int], longest: int) -> list[Scored]:
    """Divides a text that is longer than a context into spans, each of which gets as much context as there is room for. Every
    id is in one span.

    Args:
        prefix: an id that comes before the text.
        longest: number of tokens that the model sees at once.
    """
    whole, spans, done = [prefix, *ids], list[Scored](), 0
    while done < len(ids):
        end = min(done + longest, len(ids))
        spans.append(Scored(whole[max(0, end - longest) : end + 1], end - done))
        done = end
    return spans
