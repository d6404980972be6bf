"""The memory of one rank by formula: here, what a forward pass keeps for the backward pass (``activations``), and what a
backward pass keeps until the gradients of weights are computed, with a zero-bubble schedule (``left``).

Weights and gradients are ``weights_and_gradients``; how many tokens and heads a strategy keeps on a rank are ``tensor.memory``
and ``isp.memory``; ``plan.memory`` puts all of it together.

For each token, a dense layer keeps the inputs of both norms, the input of q, k and v, and the input of gate and up (D elements
each); q, k, v and the output of attention; gate, up and their product. A layer with experts keeps the same for each of the k
experts of a token, and what its router computes.

For the gradients of weights, the inputs of all linears are kept, and the gradients of their outputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import ClassVar

from ..models.config import Experts
from .data_axis import Shape, largest_expert_shard, largest_shard
from .orders import BACKWARD, FORWARD, WEIGHTS, Action
from .strategy import KeptActivations, Workload


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank after the pass that leaves the most.

    It is the last forward pass after which they are most. With a zero-bubble schedule it may also be a backward pass, because
    these keep something, too. (If there are many micro-batches, it may be an earlier pass, with the same bytes.)
    """

    masters: int
    """The master weights."""
    moments: int
    """The moments of AdamW."""
    state: int
    """Full weights and gradients."""
    activations: int
    """What passes keep for later passes, and the messages of the pipeline."""
    after: Action
    """The pass."""

    NAMES: ClassVar = {
        "masters": "master weights", "moments": "moments", "state": "weights and gradients", "activations": "activations",
    }  # fmt: skip

    @property
    def total(self) -> int:
        """The sum of all."""
        return self.masters + self.moments + self.state + self.activations


def activations(work: Workload, kept: KeptActivations) -> int:
    """Returns the bytes that one forward pass through the stages of ``work`` keeps for the backward pass."""
    decoder, d = work.decoder, work.decoder.hidden_size
    norm = kept.residual_tokens * (d * work.element_bytes + 4)  # the input of a norm, and one fp32 number per token
    norms = (4 if decoder.out_norms else 2) * norm
    kernel, attention = _attention(work, kept)
    output = kernel if work.keeps_attention else 0
    layers, recomputed = 0, work.recomputed_layers
    for number in work.layers:
        mlp = _experts(work, kept) if decoder.is_sparse(number) else _mlp(work, kept, decoder.intermediate_size)
        if work.recomputed == "attention":
            layers += norms + work.element_bytes * d * kept.residual_tokens + output + mlp
        elif number in recomputed:
            layers += norm - 4 * kept.residual_tokens + output  # the input of the layer
        else:
            layers += norms + attention + mlp
    head = norm + work.element_bytes * d * (kept.loss_tokens + kept.head_rows)  # gradients, computed with the loss
    angles = work.element_bytes * work.tokens * decoder.rope.size(decoder.rotary_dim) if decoder.rope else 0
    tables = sum(len({decoder.uses_window_rope(layer) for layer in stage.layers}) for stage in work.on_rank)
    return layers + work.embeddings * kept.looked_up + work.heads * head + tables * angles


def left(work: Workload, kept: KeptActivations) -> int:
    """Returns the bytes that one backward pass through the stages of ``work`` keeps, with a zero-bubble schedule, until the
    gradients of weights are computed."""
    decoder, d = work.decoder, work.decoder.hidden_size
    ends = d * (kept.input_tokens + kept.output_tokens)  # of attention, and of an MLP
    attention, total = _left_of_attention(work, kept), 0
    for number in work.layers:
        experts = decoder.experts if decoder.is_sparse(number) else None
        total += attention
        if experts is None:
            total += ends + 3 * decoder.intermediate_size * kept.mlp_tokens
        else:
            total += work.routed_tokens * experts.top_k * (2 * d + 3 * expert_width(work, experts))
            if experts.shared_size:
                total += ends + 3 * experts.shared_size * kept.mlp_tokens + work.routed_tokens * experts.shared_gate
    return work.element_bytes * total


def _left_of_attention(work: Workload, kept: KeptActivations) -> int:
    """Returns the elements that are kept for the gradients of the weights of attention: inputs, and gradients of outputs."""
    decoder, d, ranks, tokens = work.decoder, work.decoder.hidden_size, kept.head_ranks, kept.attention_tokens
    linears = decoder.projections()
    if decoder.latent is None:
        heads, kv_heads = decoder.num_heads // ranks, max(1, decoder.num_kv_heads // ranks)
        return d * (kept.input_tokens + kept.output_tokens) + 2 * tokens * (heads + kv_heads) * decoder.head_dim
    latents = sum(linear.outputs for linear in linears.values() if linear.heads is None)
    by_heads = (linears["q"].outputs + linears["kv"].outputs + linears["o"].inputs) // ranks
    inputs = kept.shared_latents * decoder.attention_inputs
    if not kept.shared_latents:  # the residual stream counts once, as the input of all that need it
        inputs = kept.residual_tokens * (decoder.latent.query_rank + decoder.latent.rank)
    return d * (kept.residual_tokens + kept.output_tokens) + kept.residual_tokens * latents + tokens * by_heads + inputs


def _attention(work: Workload, kept: KeptActivations) -> tuple[int, int]:
    """Returns the bytes that the attention kernel returns (output and log-sum-exp), and all bytes that attention keeps."""
    decoder, tokens, ranks, e = work.decoder, kept.attention_tokens, kept.head_ranks, work.element_bytes
    heads, kv_heads = decoder.num_heads // ranks, max(1, decoder.num_kv_heads // ranks)
    output = e * tokens * heads * decoder.head_dim
    kernel = output + 4 * tokens * heads
    qkv = e * tokens * (heads + 2 * kv_heads) * decoder.head_dim
    if decoder.latent is not None:
        return kernel, _latents(work, kept) + qkv + kernel + e * tokens * heads * decoder.value_dim  # the input of o, unpadded
    inputs = e * decoder.hidden_size * kept.input_tokens
    normed = kept.normed_heads * (e * decoder.head_dim + 4) if decoder.qk_norm else 0
    return kernel, inputs + normed + qkv + kernel + (kept.attention_outputs - 1) * output


def _latents(work: Workload, kept: KeptActivations) -> int:
    """Returns the bytes of the input of latent attention, of the inputs of the norms of latents, and of the normed latents."""
    decoder, tokens, e, latent = work.decoder, kept.residual_tokens, work.element_bytes, work.decoder.latent
    assert latent is not None
    norms = e * (latent.query_rank + latent.rank + latent.rotary_dim) + 4 * (1 + (latent.query_rank > 0))
    if kept.shared_latents:
        normed = e * kept.shared_latents * decoder.attention_inputs
    else:
        normed = e * tokens * (latent.query_rank + latent.rank)
    return e * decoder.hidden_size * tokens + norms * tokens + normed


def _mlp(work: Workload, kept: KeptActivations, width: int) -> int:
    return work.element_bytes * (work.decoder.hidden_size * kept.input_tokens + 3 * width * kept.mlp_tokens)


def expert_width(work: Workload, experts: Experts) -> int:
    """Returns the number of columns of an expert that a rank computes with."""
    return experts.size // work.layout.tensor if work.layout.experts_by_tensor else experts.size


def _experts(work: Workload, kept: KeptActivations) -> int:
    """Returns the bytes that a layer with experts keeps.

    The router computes in fp32. It keeps its input, its logits and probabilities, and a few numbers for each choice. Each
    choice is a row that goes through an expert. Gathered weights do not keep the product of gate and up.
    """
    decoder, experts, layout = work.decoder, work.decoder.experts, work.layout
    assert experts is not None
    tokens, d = work.routed_tokens, decoder.hidden_size
    rows = tokens * experts.top_k
    width, parts = expert_width(work, experts), 2 if layout.mode == "isp" and layout.expert_inner > 1 else 3
    router = tokens * (8 * experts.count + 12) + rows * (4 + 8 + 4 + 1)
    if work.element_bytes != 4:
        router += 4 * d * (tokens + experts.count)  # its input and weight in fp32
    order = 2 * 8 * rows * (2 if layout.expert > 1 else 1)  # int64: the rows sorted by expert, and the inverse; for each way
    mlps = work.element_bytes * rows * (2 * d + parts * width + 1)
    total = router + order + mlps
    # The inputs of the router and of the shared expert are often the same tensor, or one is a part of the other (mtp).
    inputs = {kept.input_tokens if layout.mode == "mtp" else tokens} if work.element_bytes == 4 else set[int]()
    if experts.shared_size:
        inputs.add(work.tokens if layout.experts_by_tensor else kept.input_tokens)
        outputs = kept.input_tokens if layout.mode == "mtp" else tokens
        gated = outputs * (d + 1) if experts.shared_gate else 0
        total += work.element_bytes * (3 * experts.shared_size * kept.mlp_tokens + gated)
    return total + work.element_bytes * d * sum(inputs)


# Weights and gradients -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Elements:
    """The numbers of elements of the parameters of a stage on rank 0 of the ranks that share it. Its shards are the largest."""

    full: int
    """Before the data axis shards them."""
    gathered: int
    """The same with the padding of shards of uneven sizes, which is gathered too."""
    deferred: int
    """Of ``full``, how many are in weights whose gradients a zero-bubble schedule computes apart."""
    shard: int
    """Of a rank's shards."""

    def plus(self, other: Elements, times: int) -> Elements:
        """Returns the sum with ``times`` as many as another one."""
        return Elements(*(mine + times * theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))

    @classmethod
    def of(cls, work: Workload, shapes: Sequence[Shape], experts: Sequence[Shape], deferred: Sequence[Shape]) -> Elements:
        """Counts them.

        Args:
            experts: the shapes of experts that are a unit of their own.
            deferred: the shapes of all weights whose gradients are computed apart.
        """
        zero, expert_zero = work.layout.zero, work.layout.expert_zero
        dense = sum(largest_shard(shape, zero) for shape in shapes)
        of_experts = sum(largest_expert_shard(shape, expert_zero) for shape in experts)
        full, apart = (sum(math.prod(shape) for shape in kind) for kind in ((*shapes, *experts), deferred))
        gathered = zero * dense + expert_zero * of_experts
        return cls(full, gathered, apart if work.zero_bubble else 0, dense + of_experts)


def weights_and_gradients(work: Workload, stage: Elements, passes: str) -> int:
    """Returns the bytes of the full weights and the gradients of a stage.

    | policy         | masters | moments | full weights             | gradients |
    |----------------|---------|---------|--------------------------|-----------|
    | ZeRO-1.5       | 4 P / z | 8 P / z | c P, with padding        | g P       |
    | FSDP           | 4 P / z | 8 P / z | those of units in use    | 4 P / z   |
    | single process | 4 P     | 8 P     | c P; fp32: the masters   | 4 P       |

    P = number of parameters on a rank before the data axis shards them, z = ranks of a ZeRO group, c = bytes per element of the
    weights with which the model computes, g = bytes per element of a gradient. The units in use of FSDP are not counted. There
    are gradients from the first backward pass on; after the last one, those of ZeRO-1.5 are sharded, too, and the full weights
    are freed. With a zero-bubble schedule, ZeRO-1.5 computes gradients of weights with c bytes, and adds them to the others (g)
    in the next backward pass.

    Args:
        passes: the kinds of the passes through the stage so far in this step, such as "FFBFB".
    """
    layout, compute, gradient = work.layout, work.element_bytes, work.gradient_bytes
    last = WEIGHTS if work.zero_bubble else BACKWARD
    others, deferred = ((stage.full - stage.deferred) * (BACKWARD in passes), stage.deferred * (last in passes))
    if layout.world == layout.pipeline:
        return (0 if compute == 4 else compute * stage.full) + 4 * (others + deferred)
    if layout.fsdp or passes.count(last) == work.micro_batches:
        return 4 * stage.shard * (BACKWARD in passes)
    weights = compute * stage.gathered * (FORWARD in passes)
    if not work.zero_bubble or compute == gradient:
        return weights + gradient * (others + deferred)
    back = passes.replace(FORWARD, "")
    added, computed = WEIGHTS + BACKWARD in back, back.endswith(WEIGHTS)
    return weights + gradient * others + stage.deferred * (gradient * added + compute * computed)
