"""Generates text with a key/value cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .layers import Cache, DecoderLayer


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 1.0
    """The logits are divided by this. 0: always the most likely token."""
    top_k: int = 0
    """Draw only from this many most likely tokens. 0: from all."""
    top_p: float = 1.0
    """Draw only from the smallest set of most likely tokens whose probabilities add up to at least this
    (https://arxiv.org/abs/1904.09751)."""


class LanguageModel(Protocol):
    """A decoder, or what works like one."""

    training: bool

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
    dtype: torch.dtype | None = None,
) -> list[int]:
    """Generates the ids that follow ``prompt``.

    Args:
        prompt: ids of the prompt, at least one.
        max_new_tokens: the maximum number of ids to generate.
        seed: seed of the random draws.
        eos_ids: generation ends after one of these ids.
        dtype: dtype of the cache, which must be that of the computation. None: the weights' dtype, which is right unless a
            sharded model casts its weights.

    Returns:
        The generated ids, including the id that ended them.
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
    with torch.compiler.set_stance("force_eager"):
        for _ in range(max_new_tokens):
            logits = model(tokens, caches=caches)
            caches = [Cache(c.keys, c.values, c.length + tokens.shape[1]) for c in caches]
            chosen = choose(logits[0, -1].float(), sampling, generator)
            out.append(chosen)
            if chosen in eos_ids:
                break
            tokens = torch.tensor([[chosen]], device=device)
    model.train(training)
    return out


def empty_caches(model: LanguageModel, capacity: int, dtype: torch.dtype, device: torch.device) -> list[Cache]:
    """Returns an empty cache for ``capacity`` tokens for each layer."""
    caches = []
    for _, layer in model.numbered_layers():
        shape = (1, capacity, layer.attn.kv_heads, layer.attn.head_dim)
        keys, values = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
        caches.append(Cache(keys, values, 0))
    return caches


def choose(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Draws one id from fp32 logits [V]."""
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    logits_V = logits_V / sampling.temperature
    if 0 < sampling.top_k < logits_V.numel():
        smallest = logits_V.topk(sampling.top_k).values[-1]
        logits_V = logits_V.masked_fill(logits_V < smallest, -torch.inf)
    probabilities = logits_V.softmax(-1)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        ordered[ordered.cumsum(0) - ordered >= sampling.top_p] = 0
        probabilities = torch.zeros_like(probabilities).scatter_(0, order, ordered)
    return int(torch.multinomial(probabilities, 1, generator=generator))
