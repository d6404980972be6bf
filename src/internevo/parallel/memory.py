"""The memory of one rank by formula: here, what a forward pass keeps for the backward pass (``activations``), and what a
backward pass keeps until the gradients of weights are computed, with a zero-bubble schedule (``left``).

Weights and gradients are ``weights_and_gradients``; how many tokens and heads a strategy keeps on a rank are ``tensor.memory``
and ``isp.memory``; ``plan.memory`` puts all of it together.

For each token, a dense layer keeps the inputs of both norms, the input of q, k and v, and the input of gate and up (D elements
each); q, k, v and the output of attention; gate, up and their product. A layer with experts keeps the same for each of the k
experts of a token, and what its router computes: its probabilities, the choices and their weights, and the order of the rows.

For the gradients of weights, the inputs of all linears are kept, and the gradients of their outputs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from ..models.config import Experts, Stage
from .data_axis import Shape, expert_shard_size, shard_size
from .orders import BACKWARD, FORWARD, WEIGHTS, Action
from .strategy import KeptActivations, LayerKind, Workload


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
    """What passes keep for later passes, the messages of the pipeline, and what is added up over a step."""
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
    layers = sum(count * layer_activations(work, kept, kind) for kind, count in Counter(work.kinds).items())
    ends = work.embeddings * kept.looked_up + work.heads * head_activations(work, kept)
    return layers + ends + tables(work) + sum(_losses(work, stage) for stage in work.on_rank)


def tables(work: Workload) -> int:
    """Returns the bytes that the layers of the stages of ``work`` share in a forward pass: angles of rotary embeddings, or the
    slopes of ALiBi."""
    decoder = work.decoder
    if decoder.rope is None:
        return 4 * decoder.num_heads * len(work.on_rank)
    number = sum(len({decoder.rotary(layer) for layer in stage.layers} - {"none"}) for stage in work.on_rank)
    return number * work.element_bytes * work.tokens // work.layout.context * decoder.rope.size(decoder.rotary_dim)


def layer_activations(work: Workload, kept: KeptActivations, kind: LayerKind) -> int:
    """Returns the bytes that the forward pass of a layer keeps."""
    decoder, d = work.decoder, work.decoder.hidden_size
    norm = _norm(work, kept)
    norms = (4 if decoder.out_norms else 2) * norm
    kernel, attention = _attention(work, kept)
    output = kernel if work.keeps_attention else 0
    if kind.recomputed:
        return norm - 4 * kept.residual_tokens + output  # the input of the layer
    mlp = _experts(work, kept) if kind.sparse else _mlp(work, kept, decoder.intermediate_size)
    if work.recomputed == "attention":
        return norms + work.element_bytes * d * kept.residual_tokens + output + mlp
    return norms + attention + mlp + _borders(work, kind)


def _borders(work: Workload, kind: LayerKind) -> int:
    """Returns the bytes that say where rows begin and end, if they are computed as documents: one after the other with 2D
    sequence parallelism, and together with a window, ALiBi or a cap."""
    decoder, borders = work.decoder, 4 * (work.rows + 1)
    if work.layout.context > 1:
        return 8 * (work.rows > 0)
    return borders * (work.rows > 0 and (decoder.rope is None or kind.windowed or decoder.attention_softcap > 0))


def head_activations(work: Workload, kept: KeptActivations) -> int:
    """Returns the bytes that the last norm and the head keep."""
    d = work.decoder.hidden_size
    head = _norm(work, kept) + work.element_bytes * d * (kept.loss_tokens + kept.head_rows)  # gradients, with the loss
    if work.decoder.norm_head:  # two numbers for each row of the weight, and the weight itself, if it is not a parameter
        is_another = work.element_bytes != 4 or (work.layout.mode == "isp" and work.layout.weight > 1)
        head += kept.head_rows * (8 + 4 * d * is_another)
    return head


def _norm(work: Workload, kept: KeptActivations) -> int:
    """Returns the bytes that a norm keeps: its input, and one fp32 number per token."""
    return kept.residual_tokens * (work.decoder.hidden_size * work.element_bytes + 4)


def _losses(work: Workload, stage: Stage) -> int:
    """Returns the bytes that the loss of a stage keeps: its own 4; for the losses of routers, the number of predicted tokens,
    and what the load-balancing loss multiplies. A pooled one also has an input of later stages, which gets a gradient."""
    loss, experts = work.loss, work.decoder.experts
    sparse = sum(work.decoder.is_sparse(layer) for layer in stage.layers)
    pooled, each = work.pooled_bytes * stage.heads, 0
    if experts is not None and loss.balance and loss.balance_kind == "gshard":
        # The first choices; and the probabilities, if both are sums of the same all-reduce.
        each = 4 * experts.count * sparse * (1 + work.sums_routers)
    of_routers = bool(pooled or each or (sparse and loss.router_z))
    received = work.pooled_bytes * (not stage.embeds)
    return 4 * (stage.heads or of_routers) + 8 * of_routers + pooled + received + each


def left(work: Workload, kept: KeptActivations) -> int:
    """Returns the bytes that one backward pass through the stages of ``work`` keeps, with a zero-bubble schedule, until the
    gradients of weights are computed."""
    return sum(count * layer_left(work, kept, kind) for kind, count in Counter(work.kinds).items())


def layer_left(work: Workload, kept: KeptActivations, kind: LayerKind) -> int:
    """The same for one layer."""
    decoder, d, attention = work.decoder, work.decoder.hidden_size, _left_of_attention(work, kept)
    ends = d * (kept.input_tokens + kept.output_tokens)  # of an MLP
    experts = decoder.experts if kind.sparse else None
    if experts is None:
        return work.element_bytes * (attention + ends + 3 * decoder.intermediate_size * kept.mlp_tokens)
    mlps = work.routed_tokens * experts.top_k * (2 * d + 3 * expert_width(work, experts))
    if experts.shared_size:
        mlps += ends + 3 * experts.shared_size * kept.mlp_tokens + work.routed_tokens * experts.shared_gate
    ends = 4 * experts.count // work.layout.expert  # of the rows of each expert
    return work.element_bytes * (attention + mlps) + ends


def _left_of_attention(work: Workload, kept: KeptActivations) -> int:
    """Returns the elements that are kept for the gradients of the weights of attention: inputs, and gradients of outputs."""
    decoder, d, ranks, tokens = work.decoder, work.decoder.hidden_size, kept.head_ranks, kept.attention_tokens
    linears = decoder.projections()
    if decoder.latent is None:
        # The gradients of keys and values; isp has added up those of replicas of a head.
        shared = tokens * decoder.num_kv_heads // ranks if work.layout.mode == "isp" else tokens * _kv_heads(work, kept)
        outputs = 2 * (tokens * decoder.num_heads // ranks + shared) * decoder.head_dim
        return d * (kept.input_tokens + kept.output_tokens) + outputs
    latents = sum(linear.outputs for linear in linears.values() if linear.heads is None)
    by_heads = (linears["q"].outputs + linears["kv"].outputs + linears["o"].inputs) // ranks
    inputs = kept.shared_latents * decoder.attention_inputs
    if not kept.shared_latents:  # the residual stream counts once, as the input of all that need it
        inputs = kept.residual_tokens * (decoder.latent.query_rank + decoder.latent.rank)
    return d * (kept.residual_tokens + kept.output_tokens) + kept.residual_tokens * latents + tokens * by_heads + inputs


def _attention(work: Workload, kept: KeptActivations) -> tuple[int, int]:
    """Returns the bytes that the attention kernel returns (output and log-sum-exp), and all bytes that attention keeps."""
    decoder, tokens, ranks, e = work.decoder, kept.attention_tokens, kept.head_ranks, work.element_bytes
    heads, kv_heads = decoder.num_heads // ranks, _kv_heads(work, kept)
    output = e * tokens * heads * decoder.head_dim
    kernel = output + 4 * tokens * heads
    qkv = e * (tokens * heads + 2 * kept.key_tokens * kv_heads) * decoder.head_dim
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


def _kv_heads(work: Workload, kept: KeptActivations) -> int:
    """Returns the number of key/value heads in the attention of a rank."""
    return max(1, work.decoder.num_kv_heads // kept.head_ranks)


def _mlp(work: Workload, kept: KeptActivations, width: int) -> int:
    return work.element_bytes * (work.decoder.hidden_size * kept.input_tokens + 3 * width * kept.mlp_tokens)


def expert_width(work: Workload, experts: Experts) -> int:
    """Returns the number of columns of an expert that a rank computes with."""
    return experts.size // work.layout.tensor if work.layout.experts_by_tensor else experts.size


def _experts(work: Workload, kept: KeptActivations) -> int:
    """Returns the bytes that a layer with experts keeps.

    The router computes in fp32. For each token it keeps the probabilities, and the sum of those chosen; for the balancing loss
    with sigmoid scores also the sum of all; for the z-loss, or an all-reduce of all that routers sum up, the logits and their
    log-sum-exp. For each choice it keeps its expert (int64), its probability, and whether it is dropped.
    Each choice is a row that goes through an expert. Gathered weights do not keep the product of gate and up.
    """
    decoder, experts, layout = work.decoder, work.decoder.experts, work.layout
    assert experts is not None
    tokens, d = work.routed_tokens, decoder.hidden_size
    rows = tokens * experts.top_k
    width, parts = expert_width(work, experts), 2 if layout.mode == "isp" and layout.expert_inner > 1 else 3
    router = 4 * tokens * experts.count + rows * (8 + 1)
    if experts.normalize:
        router += 4 * (rows + tokens)
    if experts.scoring == "sigmoid" and (work.loss.balance or (work.loss.router_z and work.sums_routers)):
        router += 4 * tokens  # the sums of the scores
    if work.loss.router_z or (work.loss.balance and work.sums_routers):
        router += 4 * tokens * (experts.count + 1)
    if work.element_bytes != 4:
        router += 4 * d * (tokens + experts.count)  # its input and weight in fp32
    order = 2 * 8 * rows * (2 if layout.expert > 1 else 1)  # int64: the rows sorted by expert, and the inverse; for each way
    ends = 4 * experts.count // layout.expert  # of the rows of each expert
    mlps = work.element_bytes * rows * (2 * d + parts * width + 1)
    total = router + order + ends + mlps
    # The inputs of the router and of the shared expert are often the same tensor, or one is a part of the other (mtp).
    inputs = {kept.input_tokens if layout.mode == "mtp" else tokens} if work.element_bytes == 4 else set[int]()
    if experts.shared_size:
        inputs.add(work.tokens if layout.experts_by_tensor else kept.input_tokens)
        outputs = kept.input_tokens if layout.mode == "mtp" else tokens
        gated = outputs * (d + 1) if experts.shared_gate else 0
        total += work.element_bytes * (3 * experts.shared_size * kept.mlp_tokens + gated)
    return total + work.element_bytes * d * sum(inputs)


# What a layer has in flight --------------------------------------------------------------------------------------------


def travelling(work: Workload, kind: LayerKind) -> int:
    """Returns what experts have while their rows come back from other ranks, besides what they keep: the rows before they were
    sent, as they have arrived, the results, and those in the order in which they are sent and received."""
    experts = work.decoder.experts
    if experts is None or not kind.sparse:
        return 0
    rows = work.element_bytes * work.routed_tokens * experts.top_k * work.decoder.hidden_size
    return rows * (4 if work.layout.expert > 1 else 1)


def gathering(work: Workload, kept: KeptActivations, kind: LayerKind) -> int:
    """Returns how much more attention has than what its layer keeps at the end, while context ranks gather keys and values: its
    input; queries, before and after the rotary embedding; this rank's own keys and values, which are copied to be sent; and all
    keys and values twice, as they come and in the order of the row."""
    decoder, e = work.decoder, work.element_bytes
    if work.layout.context == 1:
        return 0
    heads, kv_heads = decoder.num_heads // kept.head_ranks, _kv_heads(work, kept)
    keys = 2 * e * decoder.head_dim * kept.key_tokens * kv_heads
    queries = e * decoder.head_dim * kept.attention_tokens * heads
    inputs = e * decoder.hidden_size * kept.residual_tokens + e * decoder.hidden_size * kept.input_tokens
    own = keys // work.layout.context
    own = 2 * own + (own // 2 if work.layout.head == 1 else 0)
    return inputs + 2 * queries + own + 2 * keys - layer_activations(work, kept, kind)


# Weights and gradients -----------------------------------------------------------------------------------------------


class Elements(NamedTuple):
    """The numbers of elements of the parameters of a stage on one of the ranks that share it."""

    full: int
    """Before the data axis shards them."""
    gathered: int
    """The same with the padding of shards of uneven sizes, which is gathered too."""
    deferred: int
    """Of ``full``, how many are in weights whose gradients a zero-bubble schedule computes apart."""
    shard: int
    """Of a rank's shards."""
    padded: int
    """The same with the padding: gradients are views of the buffer that a reduce-scatter has filled."""
    matrices: int
    """Of ``shard``, how many are in matrices that Muon updates."""
    head: int = 0
    """Of ``gathered``, how many are in the unit of the head."""

    def plus(self, other: Elements, times: int) -> Elements:
        """Returns the sum with ``times`` as many as another one."""
        return Elements(*(mine + times * theirs for mine, theirs in zip(self, other, strict=True)))

    @classmethod
    def of(
        cls,
        work: Workload,
        shapes: Sequence[Shape],
        experts: Sequence[Shape],
        deferred: Sequence[Shape],
        matrices: Sequence[Shape] | None = None,
    ) -> Elements:
        """Counts them.

        Args:
            experts: the shapes of experts that are a unit of their own.
            deferred: the shapes of all weights whose gradients are computed apart.
            matrices: those of ``shapes`` that Muon updates, with all experts; None: there is no Muon.
        """
        zero, expert_zero = work.layout.zero, work.layout.expert_zero
        dense = sum(shard_size(shape, zero) for shape in shapes)
        of_experts = sum(expert_shard_size(shape, expert_zero) for shape in experts)
        shard, of_matrices = (sum(shard_size(s, zero, work.zero_rank) for s in its) for its in (shapes, matrices or ()))
        expert_shard = sum(expert_shard_size(shape, expert_zero, work.expert_zero_rank) for shape in experts)
        full, apart = (sum(math.prod(shape) for shape in kind) for kind in ((*shapes, *experts), deferred))
        gathered = zero * dense + expert_zero * of_experts
        of_matrices += 0 if matrices is None else expert_shard
        return cls(full, gathered, apart if work.zero_bubble else 0, shard + expert_shard, dense + of_experts, of_matrices)


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
    are freed. FSDP keeps those of the head from a forward pass to its backward pass.

    Args:
        passes: the kinds of the passes through the stage so far in this step, such as "FFBFB".
    """
    layout, compute, gradient = work.layout, work.element_bytes, work.gradient_bytes
    last = WEIGHTS if work.zero_bubble else BACKWARD
    others, deferred = ((stage.full - stage.deferred) * (BACKWARD in passes), stage.deferred * (last in passes))
    if layout.world == layout.pipeline:
        return (0 if compute == 4 else compute * stage.full) + 4 * (others + deferred)
    if layout.fsdp or passes.count(last) == work.micro_batches:
        in_use = layout.fsdp and passes.count(FORWARD) > passes.count(BACKWARD)
        return 4 * stage.padded * (BACKWARD in passes) + compute * stage.head * in_use
    weights = compute * stage.gathered * (FORWARD in passes)
    return weights + gradient * (others + deferred)
