"""Memory of one rank, by formula; what a forward pass keeps for backward.

Per layer and token, a dense layer keeps for backward: the inputs of both norms, and the inputs of q, k, v and of gate, up (D
each); q, k, v and the attention's output; gate, up, and their product. A layer with experts keeps the same of each token's k
experts, and what its router computes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .strategy import Kept, Workload


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank, when the last forward of a step is over and its backward begins."""

    masters: int
    """fp32 weights."""
    moments: int
    """AdamW's."""
    state: int
    """Weights in full and gradients, before that forward."""
    activations: int
    """What that forward has kept."""

    NAMES: ClassVar = {
        "masters": "fp32 masters", "moments": "moments", "state": "weights and gradients", "activations": "activations",
    }  # fmt: skip

    @property
    def total(self) -> int:
        """All of it."""
        return self.masters + self.moments + self.state + self.activations


def activations(work: Workload, kept: Kept) -> int:
    """Bytes that one forward keeps for backward."""
    decoder, d = work.decoder, work.decoder.hidden_size
    stream = kept.outside * (d * work.element + 4)  # a norm's input, and its scale
    kernel, attention = _attention(work, kept)
    output = kernel if work.keeps_attention else 0
    layers = 0
    for number in range(decoder.num_layers):
        mlp = _experts(work, kept) if decoder.is_sparse(number) else _mlp(work, kept, decoder.intermediate_size)
        if work.share == "attention":
            layers += 2 * stream + work.element * d * kept.outside + output + mlp
        elif number < work.recomputed_layers:
            layers += stream - 4 * kept.outside + output
        else:
            layers += 2 * stream + attention + mlp
    head = work.element * d * (kept.loss + kept.head_rows)  # gradients, computed with the loss
    angles = work.element * work.tokens * decoder.head_dim if decoder.rope else 0
    return layers + stream + head + angles


def _attention(work: Workload, kept: Kept) -> tuple[int, int]:
    """Bytes of the kernel's output, with its log-sum-exp; and of all that attention keeps."""
    decoder, tokens, ranks = work.decoder, kept.attention, kept.head_ranks
    heads, kv_heads = decoder.num_heads // ranks, max(1, decoder.num_kv_heads // ranks)
    output = work.element * tokens * heads * decoder.head_dim
    kernel = output + 4 * tokens * heads
    given = work.element * decoder.hidden_size * kept.inputs
    qkv = work.element * tokens * (heads + 2 * kv_heads) * decoder.head_dim
    normed = kept.normed_heads * (work.element * decoder.head_dim + 4) if decoder.qk_norm else 0
    return kernel, given + normed + qkv + kernel + (kept.outputs - 1) * output


def _mlp(work: Workload, kept: Kept, width: int) -> int:
    return work.element * (work.decoder.hidden_size * kept.inputs + 3 * width * kept.columns)


def _experts(work: Workload, kept: Kept) -> int:
    """The router computes in fp32 and keeps its input, its logits and probabilities, and of each choice a few numbers; each
    choice is a row that goes through an expert."""
    decoder, experts = work.decoder, work.decoder.experts
    assert experts is not None
    tokens, d = kept.inputs, decoder.hidden_size
    rows = tokens * experts.top_k
    router = tokens * (8 * experts.count + 12) + rows * (4 + 8 + 4 + 1)
    if work.element != 4:
        router += 4 * d * (tokens + experts.count)  # its input and weight in fp32
    order = 2 * 8 * rows
    through = work.element * rows * (2 * d + 3 * experts.size + 1)
    total = router + order + through
    if experts.shared_size:
        return total + _mlp(work, kept, experts.shared_size) + work.element * tokens * (d + 1)
    return total + (work.element * d * tokens if work.element == 4 else 0)
