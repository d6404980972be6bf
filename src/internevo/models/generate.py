"""Generates text with a key/value cache."""

from __future__ import annotations

import math
from collections.abc import Iterator
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

    def __call__(self, tokens: Tensor, *, caches: list[Cache]) -> Tensor:
        """Returns the logits [B, S, V]."""

    def numbered_layers(self) -> list[tuple[int, DecoderLayer]]:
        """Returns the layers that are on this rank."""

    def parameters(self) -> Iterator[nn.Parameter]: ...
    def train(self, mode: bool = True) -> Any: ...
    def eval(self) -> Any: ...


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompt: list[int],
    max_new_tokens: int,
    sampling: Sampling,
    *,
    seed: int = 0,
    eos_ids: tuple[int, ...] = (),
    vocab_size: int | None = None,
    dtype: torch.dtype | None = None,
) -> list[int]:
    """Generates the ids that follow ``prompt``.

    Args:
        prompt: ids of the prompt, at least one.
        max_new_tokens: the maximum number of ids to generate.
        seed: seed of the random draws.
        eos_ids: generation ends after one of these ids.
        vocab_size: only ids below this are drawn: those that the tokenizer has. None: all of the model.
        dtype: dtype of the cache, which must be that of the computation. None: the weights' dtype, which is right unless a
            sharded model casts its weights.

    Returns:
        The generated ids, including the id that ended them.

    Raises:
        InternEvoError: if there is not enough memory for the cache, or the model computes logits that are not finite.
    """
    weight = next(model.parameters())
    device = weight.device
    generator = torch.Generator(device=device).manual_seed(seed)
    caches = empty_caches(model, len(prompt) + max_new_tokens, dtype or weight.dtype, device)
    tokens = torch.tensor([prompt], device=device)
    out: list[int] = []
    # Layers are compiled for the shapes of training; generation has a new shape for every token.
    training = model.training
    model.eval()
    with running_uncompiled():
        for _ in range(max_new_tokens):
            if _angles_change(model.config, caches[0].length, caches[0].length + tokens.shape[1]):
                caches = [Cache(c.keys, c.values, 0) for c in caches]
                tokens = torch.tensor([[*prompt, *out]], device=device)
            logits = model(tokens, caches=caches)
            caches = [Cache(c.keys, c.values, c.length + tokens.shape[1]) for c in caches]
            chosen = choose(logits[0, -1, :vocab_size].float(), sampling, generator)
            out.append(chosen)
            if chosen in eos_ids:
                break
            tokens = torch.tensor([[chosen]], device=device)
    model.train(training)
    return out


def _angles_change(config: DecoderConfig, before: int, after: int) -> bool:
    """Whether the rotary embedding of the first ``before`` tokens is another one in a text of ``after`` tokens, so that their
    keys must be computed again. (With dynamic scaling they stay as they are, as in Hugging Face's models.)"""
    rope = config.rope
    if rope is None or rope.kind != "longrope":
        return False
    return 0 < before <= rope.options["original_max_position_embeddings"] < after


def empty_caches(model: LanguageModel, capacity: int, dtype: torch.dtype, device: torch.device) -> list[Cache]:
    """Returns an empty cache for ``capacity`` tokens for each layer.

    Raises:
        InternEvoError: if there is not enough memory.
    """
    caches = []
    for _, layer in model.numbered_layers():
        shape = (1, capacity, layer.attn.kv_heads, layer.attn.head_dim)
        try:
            keys, values = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
        except RuntimeError as error:
            raise InternEvoError(
                f"there is not enough memory to keep the keys and values of {capacity:,} tokens; generate fewer: {error}"
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
        before = ordered.cumsum(0) - ordered
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
