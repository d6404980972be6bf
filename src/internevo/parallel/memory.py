"""The memory of one rank by formula: here, what a forward pass keeps for the backward pass (``activations``).

Weights, gradients and optimizer state are ``data_axis.memory``; how many tokens and heads a strategy keeps on a rank are
``tensor.memory`` and ``isp.memory``; ``plan.memory`` puts all of it together.

For each token, a dense layer keeps the inputs of both norms, the input of q, k and v, and the input of gate and up (D elements
each); q, k, v and the output of attention; gate, up and their product. A layer with experts keeps the same for each of the k
experts of a token, and what its router computes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .strategy import KeptActivations, Workload


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank between the last forward pass of a step and its backward pass."""

    masters: int
    """The master weights."""
    moments: int
    """The moments of AdamW."""
    state: int
    """Full weights and gradients, as they are before that forward pass."""
    activations: int
    """What that forward pass has kept for the backward pass."""

    NAMES: ClassVar = {
        "masters": "master weights", "moments": "moments", "state": "weights and gradients", "activations": "activations",
    }  # fmt: skip

    @property
    def total(self) -> int:
        """The sum of all."""
        return self.masters + self.moments + self.state + self.activations


def activations(work: Workload, kept: KeptActivations) -> int:
    """Returns the bytes that one forward pass keeps for the backward pass."""
    decoder, d = work.decoder, work.decoder.hidden_size
    norm = kept.residual_tokens * (d * work.element_bytes + 4)  # the input of a norm, and one fp32 number per token
    kernel, attention = _attention(work, kept)
    output = kernel if work.keeps_attention else 0
    layers, recomputed = 0, work.recomputed_layers
    for number in work.layers:
        mlp = _experts(work, kept) if decoder.is_sparse(number) else _mlp(work, kept, decoder.intermediate_size)
        if work.recomputed == "attention":
            layers += 2 * norm + work.element_bytes * d * kept.residual_tokens + output + mlp
        elif number in recomputed:
            layers += norm - 4 * kept.residual_tokens + output  # the input of the layer
        else:
            layers += 2 * norm + attention + mlp
    head = norm + work.element_bytes * d * (kept.loss_tokens + kept.head_rows)  # gradients, computed with the loss
    angles = work.element_bytes * work.tokens * decoder.head_dim if decoder.rope else 0
    return layers + work.heads * head + len(work.on_rank) * angles


def _attention(work: Workload, kept: KeptActivations) -> tuple[int, int]:
    """Returns the bytes that the attention kernel returns (output and log-sum-exp), and all bytes that attention keeps."""
    decoder, tokens, ranks = work.decoder, kept.attention_tokens, kept.head_ranks
    heads, kv_heads = decoder.num_heads // ranks, max(1, decoder.num_kv_heads // ranks)
    output = work.element_bytes * tokens * heads * decoder.head_dim
    kernel = output + 4 * tokens * heads
    inputs = work.element_bytes * decoder.hidden_size * kept.input_tokens
    qkv = work.element_bytes * tokens * (heads + 2 * kv_heads) * decoder.head_dim
    normed = kept.normed_heads * (work.element_bytes * decoder.head_dim + 4) if decoder.qk_norm else 0
    return kernel, inputs + normed + qkv + kernel + (kept.attention_outputs - 1) * output


def _mlp(work: Workload, kept: KeptActivations, width: int) -> int:
    return work.element_bytes * (work.decoder.hidden_size * kept.input_tokens + 3 * width * kept.mlp_tokens)


def _experts(work: Workload, kept: KeptActivations) -> int:
    """Returns the bytes that a layer with experts keeps.

    The router computes in fp32. It keeps its input, its logits and probabilities, and a few numbers for each choice. Each
    choice is a row that goes through an expert.
    """
    decoder, experts = work.decoder, work.decoder.experts
    assert experts is not None
    tokens, d = kept.input_tokens, decoder.hidden_size
    rows = tokens * experts.top_k
    router = tokens * (8 * experts.count + 12) + rows * (4 + 8 + 4 + 1)
    if work.element_bytes != 4:
        router += 4 * d * (tokens + experts.count)  # its input and weight in fp32
    order = 2 * 8 * rows  # int64: the rows sorted by expert, and the inverse
    mlps = work.element_bytes * rows * (2 * d + 3 * experts.size + 1)
    total = router + order + mlps
    if experts.shared_size:
        return total + _mlp(work, kept, experts.shared_size) + work.element_bytes * tokens * (d + 1)
    return total + (work.element_bytes * d * tokens if work.element_bytes == 4 else 0)
