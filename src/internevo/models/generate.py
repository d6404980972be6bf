"""Generates text with a key/value cache."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import InternEvoError, UsageError
from ..ops.compiler import running_uncompiled
from .config import DecoderConfig
from .layers import Cache, DecoderLayer

GREEDY = 1e-6
"""Below this temperature, the most likely token is always chosen."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Raises:
        UsageError: if a value is not in its range.
    """

    temperature: float = 1.0
    """The logits are divided by this. 0: always the most likely token."""
    top_k: int = 0
    """Draw only from this many most likely tokens. 0: from all."""
    top_p: float = 1.0
    """Draw only from the smallest set of most likely tokens whose probabilities add up to at least this
    (https://arxiv.org/abs/1904.09751). The most likely token is always in it."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UsageError(f"temperature = {self.temperature} must be a finite number of at least 0")
        if self.top_k < 0:
            raise UsageError(f"top_k = {self.top_k} must be at least 0")
        if not 0 <= self.top_p <= 1:
            raise UsageError(f"top_p = {self.top_p} must be a number from 0 to 1")


class LanguageModel(Protocol):
    """A decoder, or what works like one."""

    training: bool
    config: DecoderConfig

    def __call__(self, tokens: Tensor, *, caches: list[Cache], last_only: bool = False) -> Tensor:
        """Returns the logits [B, S, V], or those of the last tokens [B, 1, V]."""

    def numbered_layers(self) -> list[tuple[int, DecoderLayer]]:
        """Returns the layers that are on this rank."""

    def parameters(self) -> Iterator[nn.Parameter]: ...
    def train(self, mode: bool = True) -> Any: ...
    def eval(self) -> Any: ...


@contextmanager
def inference(model: LanguageModel) -> Iterator[None]:
    """A context without gradients, in which the model is in evaluation mode, and its layers run as they are written: they are
    compiled for the shapes of training, and generation has a new shape for every token."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), running_uncompiled():
            yield
    finally:
        model.train(training)


class Continuation:
    """Continues several texts together, one token of each per step. What a text becomes does not depend on the others, except
    by rounding, and where experts have a capacity in evaluation.

    The texts are rows with padding on their left, so that all of them end at the same place.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int | Sequence[int],
        sampling: Sampling,
        *,
        seeds: Sequence[int],
        eos_ids: Collection[int] = (),
        vocab_size: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """
        Args:
            prompts: the ids of each text so far, at least one.
            max_new_tokens: the maximum number of ids to generate, of all texts or of each.
            seeds: the seed of each text's random draws.
            eos_ids: a text ends after one of these ids.
            vocab_size: only ids below this are drawn: those that the tokenizer has. None: all of the model.
            dtype: dtype of the cache, which must be that of the computation. None: the weights' dtype, which is right unless a
                sharded model casts its weights.

        Raises:
            InternEvoError: if there is not enough memory for the cache.
        """
        weight, count = next(model.parameters()), len(prompts)
        self.model, self.sampling, self.eos_ids, self.vocab_size = model, sampling, eos_ids, vocab_size
        self.device = weight.device
        self.limits = [max_new_tokens] * count if isinstance(max_new_tokens, int) else list(max_new_tokens)
        self.texts = [list(prompt) for prompt in prompts]
        """The ids of each text: its prompt and what was generated, including the id that ended it."""
        self.generated = [0] * count
        """How many ids of each text were generated."""
        self.generators = [torch.Generator(device=self.device).manual_seed(seed) for seed in seeds]
        self.rows = [row for row in range(count) if self.limits[row] > 0]
        """The texts that go on, in the order of the rows of the caches."""
        longest = max(map(len, self.texts))
        starts = [longest - len(self.texts[row]) for row in self.rows]
        first = torch.tensor(starts, device=self.device) if any(starts) else None
        capacity = longest + max(self.limits)
        self.caches = [
            cache._replace(first=first)
            for cache in empty_caches(model, capacity, dtype or weight.dtype, self.device, len(self.rows))
        ]

    def step(self) -> list[tuple[int, int]]:
        """Computes the next id of each text that goes on. Returns (text, id) of each; empty if all have ended.

        Raises:
            InternEvoError: if the model computes logits that are not finite.
        """
        if not self.rows:
            return []
        tokens = self._tokens()
        with inference(self.model):
            logits = self.model(tokens, caches=self.caches, last_only=True)
        self.caches = [cache._replace(length=cache.length + tokens.shape[1]) for cache in self.caches]
        new = []
        for place, row in enumerate(self.rows):
            chosen = choose(logits[place, -1, : self.vocab_size].float(), self.sampling, self.generators[row])
            self.texts[row].append(chosen)
            self.generated[row] += 1
            new.append((row, chosen))
        self.end([row for row, id_ in new if id_ in self.eos_ids or self.generated[row] == self.limits[row]])
        return new

    def end(self, rows: Collection[int]) -> None:
        """Ends texts. The caches keep the rows of the others."""
        if not rows:
            return
        kept = [place for place, row in enumerate(self.rows) if row not in rows]
        self.rows = [self.rows[place] for place in kept]
        if self.rows:
            chosen = torch.tensor(kept, device=self.device)
            self.caches = [
                Cache(c.keys[chosen], c.values[chosen], c.length, None if c.first is None else c.first[chosen])
                for c in self.caches
            ]
        else:
            self.caches = []

    def _tokens(self) -> Tensor:
        """Returns what the model has not seen: the prompts at first, and then one id of each text."""
        length = self.caches[0].length
        lengths = [len(self.texts[row]) for row in self.rows]
        if length and not any(_angles_change(self.model.config, new - 1, new) for new in lengths):
            return torch.tensor([self.texts[row][-1:] for row in self.rows], device=self.device)
        longest = length + 1 if length else max(lengths)
        self.caches = [cache._replace(length=0) for cache in self.caches]
        padded = [[0] * (longest - len(self.texts[row])) + self.texts[row] for row in self.rows]
        return torch.tensor(padded, device=self.device)


def generate(
    model: LanguageModel,
    prompt: list[int],
    max_new_tokens: int,
    sampling: Sampling,
    *,
    seed: int = 0,
    eos_ids: Collection[int] = (),
    vocab_size: int | None = None,
    dtype: torch.dtype | None = None,
) -> list[int]:
    """Generates the ids that follow ``prompt``. Arguments and errors as for ``Continuation``.

    Returns:
        The generated ids, including the id that ended them.
    """
    options = {"eos_ids": eos_ids, "vocab_size": vocab_size, "dtype": dtype}
    text = Continuation(model, [prompt], max_new_tokens, sampling, seeds=[seed], **options)  # type: ignore[arg-type]
    while text.step():
        pass
    return text.texts[0][len(prompt) :]


def _angles_change(config: DecoderConfig, before: int, after: int) -> bool:
    """Whether the rotary embedding of the first ``before`` tokens is another one in a text of ``after`` tokens, so that their
    keys must be computed again. (With dynamic scaling they stay as they are, as in Hugging Face's models.)"""
    rope = config.rope
    if rope is None or rope.kind != "longrope":
        return False
    return 0 < before <= rope.options["original_max_position_embeddings"] < after


def empty_caches(model: LanguageModel, capacity: int, dtype: torch.dtype, device: torch.device, rows: int = 1) -> list[Cache]:
    """Returns an empty cache for ``rows`` texts of ``capacity`` tokens for each layer.

    Raises:
        InternEvoError: if there is not enough memory.
    """
    caches = []
    for _, layer in model.numbered_layers():
        shape = (rows, capacity, layer.attn.kv_heads, layer.attn.head_dim)
        try:
            keys, values = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
        except RuntimeError as error:
            raise InternEvoError(
                f"there is not enough memory to keep the keys and values of {rows * capacity:,} tokens; generate fewer: {error}"
            ) from error
        caches.append(Cache(keys, values, 0))
    return caches


def choose(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Draws one id from fp32 logits [V].

    Raises:
        InternEvoError: if a logit is NaN or infinite.
    """
    if not logits_V.isfinite().all():
        raise InternEvoError("the model computes logits that are not finite: its weights have diverged or are damaged")
    if sampling.temperature < GREEDY:
        return int(logits_V.argmax())
    logits_V = (logits_V - logits_V.max()) / sampling.temperature
    if 0 < sampling.top_k < logits_V.numel():
        smallest = logits_V.topk(sampling.top_k).values[-1]
        logits_V = logits_V.masked_fill(logits_V < smallest, -torch.inf)
    probabilities = logits_V.softmax(-1)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        # CUDA's sums of numbers in floating point depend on timing; where all must be deterministic, they are errors.
        summed = ordered.cpu() if torch.are_deterministic_algorithms_enabled() else ordered
        before = summed.cumsum(0).to(ordered.device) - ordered
        ordered[1:][before[1:] >= sampling.top_p] = 0
        probabilities = torch.zeros_like(probabilities).scatter_(0, order, ordered)
    return int(torch.multinomial(probabilities, 1, generator=generator))


def longest_text(config: DecoderConfig) -> int | None:
    """Returns the largest number of tokens for which the model's positions are made; None if there is no such limit."""
    rope = config.rope
    if rope is None or rope.kind == "dynamic":
        return None
    original = rope.options.get("original_max_position_embeddings", config.max_position_embeddings)
    return max(config.max_position_embeddings, int(original * rope.factor))
