"""The most memory of a rank at any moment of a step, within passes too.

A pass begins or ends with what ``parallel.kept`` and ``parallel.memory`` say. Between, layer by layer:

| pass                 | has in addition                                                                                    |
|----------------------|----------------------------------------------------------------------------------------------------|
| forward              | at its end, in the head: logits of a chunk of tokens, and a product for the gradient of its weight  |
| backward             | what is recomputed, and gradients of activations (``_backward``). After each layer, its activations |
|                      | are freed, and the gradients of its weights are there                                              |
| gradients of weights | one product. After each layer, what the backward pass has left is freed                            |

The last pass of a stage also reduces the gradients of each unit, from a buffer. FSDP gathers and reduces in every pass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby
from operator import add, mul
from typing import NamedTuple

from .. import ops
from ..ops.cross_entropy import BLOCK
from ..parallel import data_axis, isp, plan, tensor
from ..parallel.kept import Within, within
from ..parallel.memory import (
    activations,
    expert_width,
    gathering,
    head_activations,
    layer_activations,
    layer_left,
    left,
    travelling,
    weights_and_gradients,
)
from ..parallel.orders import BACKWARD, FORWARD, WEIGHTS
from ..parallel.strategy import KeptActivations, LayerKind, Workload


class Unit(NamedTuple):
    """Weights that the data axis gathers and reduces together, at the end of the backward pass of its first layer. Elements."""

    full: int
    """Of the weights."""
    gathered: int
    """The same with padding."""
    experts: int
    """Of ``gathered``, those of experts apart, which FSDP does not gather before the backward pass of their layer begins."""
    shard: int
    """Of a rank's shard."""
    copied: int
    """Of those that are not scattered, and copied in place of that."""
    summed: int
    """Of those that are summed over replicas: the buffer of this is kept until the end of the backward pass."""


@dataclass(frozen=True)
class Part:
    """A layer of a stage, or what is before or after its layers. All are bytes."""

    kept: int
    """What the forward pass keeps."""
    left: int
    """What a backward pass keeps for the gradients of weights."""
    gradients: int
    """Gradients of the weights that the backward pass computes."""
    deferred: int
    """Gradients of the other weights."""
    backward: tuple[int, int]
    """What the backward pass needs in addition to what it has at its beginning: if the weights have gradients, and if they have
    none yet."""
    late: int
    """What the gradients of the weights need in addition, if they are computed apart."""
    unit: Unit | None
    """The unit that is complete after it."""
    times: int = 1
    """How many of such layers there are one after the other."""


def peak(work: Workload) -> int:
    """Returns the most bytes that a rank has in memory, without master weights and moments."""
    layout = work.layout
    work = replace(work, micro_batches=plan.enough(work.micro_batches, layout.pipeline))
    kept = (isp if layout.mode == "isp" else tensor).memory(work)
    stages = [replace(work, stages=(stage,)) for stage in work.on_rank]
    forward, backward = [activations(stage, kept) for stage in stages], [left(stage, kept) for stage in stages]
    elements, parts = [plan.elements(stage) for stage in stages], [_parts(stage, kept) for stage in stages]
    state = cache(lambda place, passes: weights_and_gradients(work, elements[place], passes))
    found = 0
    for moment in within(work.schedule, layout.pipeline, layout.chunks, work.micro_batches, work.pipeline_rank):
        now = moment.messages * plan.message_bytes(work, kept) + sum(map(mul, forward, moment.forward))
        now += sum(map(mul, backward, moment.backward)) + sum(state(place, text) for place, text in enumerate(moment.passes))
        stage = stages[moment.stage]
        more = _forward(stage, kept) if moment.kind == FORWARD else _walk(stage, parts[moment.stage], moment)
        found = max(found, now + more)
    return found


def least(work: Workload, kind: LayerKind) -> int:
    """Returns what a backward pass through a layer without a head after it has at least, besides what passes keep."""
    kept = (isp if work.layout.mode == "isp" else tensor).memory(work)
    return _backward(work, kept, kind)[0]


def head(work: Workload) -> int:
    """Returns the bytes that a head keeps."""
    return head_activations(work, (isp if work.layout.mode == "isp" else tensor).memory(work))


def _forward(work: Workload, kept: KeptActivations) -> int:
    """Returns the most that a forward pass has in addition to what it keeps: in the head, or in the last layer's experts."""
    last = work.kinds[-1]
    experts = 0 if last.recomputed else travelling(work, last) + _residual(work, kept)
    in_layer = max(experts, gathering(work, kept, last))
    return max(_head_forward(work, kept), in_layer - head_activations(work, kept)) if work.heads else in_layer


def _head_forward(work: Workload, kept: KeptActivations) -> int:
    """Returns the most that a head has in a forward pass in addition to what it keeps (``ops.linear_cross_entropy``)."""
    decoder, layout, e, d = work.decoder, work.layout, work.element_bytes, work.decoder.hidden_size
    rows, on_cpu = kept.head_rows, work.device == "cpu"
    logits = rows * ops.chunk_tokens(kept.loss_tokens, rows, work.device)
    fused = not on_cpu and rows == decoder.vocab_size  # the compiler keeps what a cap needs in registers
    softmax = (12 if decoder.logit_softcap and not fused else 4 + e * (e != 4)) * logits
    product = e * logits + (e if on_cpu else 4) * d * (min(rows, BLOCK) if on_cpu else rows)
    # The gradient of the weight is added up in fp32, and at the end converted.
    chunks, end = (4 - e) * rows * d + max(softmax, product), 4 * rows * d * (e != 4)
    inputs = e * d * (kept.loss_tokens + (kept.residual_tokens if kept.residual_tokens != kept.loss_tokens else 0))
    weight = e * rows * d * (decoder.norm_head or (layout.mode == "isp" and layout.weight > 1))  # normed, or gathered
    gathered = 0
    if _is_fsdp(work):  # the buffer of the collective, which is there until the next one
        unit = _unit(work, [((_table(work),), False)])
        gathered = e * unit.gathered * (layout.zero > 1 and not decoder.tie_embeddings)
    return max(chunks, end) + inputs + weight + gathered


def _head_backward(work: Workload, kept: KeptActivations, full: int) -> tuple[int, int]:
    """Returns what the backward pass of a head and its norm needs, as ``Part.backward``.

    Args:
        full: the elements of its weights on this rank.
    """
    e, d = work.element_bytes, work.decoder.hidden_size
    product = e * d * kept.head_rows  # the gradient of the weight, which the forward pass has kept
    normed = 20 * d * kept.head_rows - product if work.decoder.norm_head else 0
    norm = _residual(work, kept) - e * d * kept.loss_tokens - product + _norm_backward(work, kept)
    gathered = e * full if work.layout.mode == "isp" and work.layout.weight > 1 else 0
    first = _full_gradient(work) * full
    return max(gathered, norm, normed), max(first + gathered, first + norm, normed)


def _walk(work: Workload, parts: Sequence[Part], moment: Within) -> int:
    """Returns the most that a backward pass, or one for the gradients of weights, has in addition to what there was before."""
    layout, e, g, full = work.layout, work.element_bytes, work.gradient_bytes, _full_gradient(work)
    first = (BACKWARD if moment.kind == BACKWARD else WEIGHTS) not in moment.passes[moment.stage]
    fsdp = _is_fsdp(work)
    none_yet = first or fsdp
    reduces = layout.world > layout.pipeline and (moment.last or fsdp)
    most = now = buffer = 0
    units = [part.unit for part in reversed(parts) if part.unit is not None]
    # The weight of both ends, if they are tied, is gathered all the time; and that of the head since the forward pass.
    kept = units[-1 if work.decoder.tie_embeddings else 0] if work.heads else None
    for part in reversed(parts):
        gathered = [unit for unit in (*units[:2], *units[2:][-1:] * work.decoder.tie_embeddings) if unit is not kept]
        in_use = e * (sum(unit.gathered for unit in gathered) - sum(unit.experts for unit in units[1:2])) * fsdp
        backward = moment.kind == BACKWARD
        most = max(most, now + in_use + (part.backward[none_yet] if backward else part.late))
        now += part.times * (part.left - part.kept if backward else -part.left)
        now += part.times * (none_yet * part.gradients if backward else _computed(work, first) * part.deferred // full)
        if part.unit is not None:
            units.pop(0)
        if part.unit is not None and reduces:
            unit = part.unit
            now -= part.times * (e * unit.gathered * (not fsdp or unit is kept) + full * unit.full) + buffer
            # FSDP has reduced and freed experts apart before: ``_backward``.
            apart = unit.experts * fsdp
            buffer = g * (unit.gathered - apart)
            reducing = now + in_use - e * apart + buffer
            most = max(most, reducing + full * (unit.full - apart), reducing + g * (unit.shard + unit.copied))
            now += buffer + part.times * g * (unit.shard if first or not fsdp else unit.summed)
    return max(most, now)


def _computed(work: Workload, first: bool) -> int:
    """Returns the bytes per element that a gradient takes which is computed apart from a backward pass, until it is added to
    those of the passes before (``first``: there are none)."""
    is_added = work.layout.world > work.layout.pipeline and work.element_bytes != work.gradient_bytes
    computed = work.element_bytes if is_added else 0
    return max(computed, work.gradient_bytes) if first else computed


def _parts(work: Workload, kept: KeptActivations) -> list[Part]:
    """Returns the parts of the one stage of ``work``, in the order of the forward pass."""
    stage, decoder = work.on_rank[0], work.decoder
    layers = {sparse: plan.layer(work, sparse) for sparse in {decoder.is_sparse(number) for number in stage.layers}}
    units = _units(work, layers)
    parts = list[Part]()
    table, d, e = _table(work), decoder.hidden_size, work.element_bytes
    tied = decoder.tie_embeddings  # then both ends are one unit, which is complete after all layers
    product = e * kept.head_rows * d
    if stage.embeds:
        computed = _residual(work, kept) + product
        backward = computed, computed if _ranks(work) > 1 else _residual(work, kept)
        twice = tied and stage.heads  # the gradient of the head waits for that of the embedding
        size = table + d * twice
        parts.append(_part(work, size, kept.looked_up + product * twice, backward, size))
    elif tied and stage.heads:
        parts.append(_part(work, 0, 0, (0, 0), table + d))
    for same, run in groupby(zip(work.kinds, units, strict=True)):
        part, count = _layer(work, kept, layers[same[0].sparse], *same), len(list(run))
        # What changes from layer to layer is the same, so that the most is at the beginning or at the end.
        parts += [part] * count if count < 4 else [part, replace(part, times=count - 2), part]
    if stage.heads:
        twice = tied and stage.embeds
        full = 0 if twice else table + d
        its = head_activations(work, kept) - product * twice
        parts.append(_part(work, full, its, _head_backward(work, kept, full), 0 if tied else full))
    return parts


def _layer(work: Workload, kept: KeptActivations, weights: Sequence[plan.OnRank], kind: LayerKind, unit: Unit | None) -> Part:
    sizes = [math.prod(weight.shape) for weight in weights]
    apart = [math.prod(weight.shape) for weight in weights if weight.deferred and work.zero_bubble]
    return Part(
        kept=layer_activations(work, kept, kind),
        left=layer_left(work, kept, kind) if work.zero_bubble else 0,
        gradients=_full_gradient(work) * (sum(sizes) - sum(apart)),
        deferred=_full_gradient(work) * sum(apart),
        backward=_backward(work, kept, kind),
        late=work.element_bytes * max(apart, default=0),
        unit=unit,
    )


def _part(work: Workload, full: int, kept: int, backward: tuple[int, int], unit: int) -> Part:
    """An end of a stage.

    Args:
        full: elements of the weights whose gradients it computes.
        unit: elements of the unit that is complete after it; 0: none.
    """
    complete = _unit(work, [((unit,), False)]) if unit else None
    return Part(kept, 0, _full_gradient(work) * full, 0, backward, 0, complete)


def _units(work: Workload, weights: Mapping[bool, Sequence[plan.OnRank]]) -> list[Unit | None]:
    """Returns for each layer the unit that is complete after its backward pass.

    Args:
        weights: those of a layer with experts (True), and of one without (False).
    """
    layout, sparse = work.layout, [kind.sparse for kind in work.kinds]
    shapes = {kind: [(p.shape, p.of_experts and layout.experts_apart) for p in its] for kind, its in weights.items()}
    sizes = {kind: sum(math.prod(shape) for shape, apart in its if not apart) for kind, its in shapes.items()}
    unit = cache(lambda kinds: _unit(work, [shape for kind in kinds for shape in shapes[kind]]))
    found: list[Unit | None] = [None] * len(sparse)
    for joined in data_axis.join([sizes[kind] for kind in sparse], None if layout.fsdp else work.bucket_elements):
        found[joined[0]] = unit(tuple(sparse[place] for place in joined))
    return found


def _unit(work: Workload, shapes: Sequence[tuple[data_axis.Shape, bool]]) -> Unit:
    """``shapes``: those of its parameters, and whether each is of experts that have ranks of their own."""
    layout, total = work.layout, Unit(0, 0, 0, 0, 0, 0)
    stage = layout.world // layout.pipeline
    for shape, apart in shapes:
        zero = layout.expert_zero if apart else layout.zero
        shard = (data_axis.expert_shard_size if apart else data_axis.shard_size)(shape, zero)
        replicas = stage // zero // (layout.expert * layout.expert_inner if apart else layout.inner)
        its = (math.prod(shape), zero * shard, zero * shard * apart, shard, shard * (zero == 1), shard * (replicas > 1))
        total = Unit(*map(add, total, its))
    return total


def _ranks(work: Workload) -> int:
    """Returns the number of ranks that share each dense weight before the data axis does."""
    return work.layout.weight if work.layout.mode == "isp" else work.layout.tensor


def _table(work: Workload) -> int:
    """Returns the elements that a rank has of the embedding's or the head's weight before the data axis shards it."""
    return work.decoder.vocab_size * work.decoder.hidden_size // _ranks(work)


def _is_fsdp(work: Workload) -> bool:
    """Whether full weights are gathered and freed in each pass."""
    return work.layout.fsdp and work.layout.world > work.layout.pipeline


def _norm_backward(work: Workload, kept: KeptActivations) -> int:
    """Returns what the backward pass of a norm needs besides the gradients of its output: of its input, or without a fused
    kernel intermediate results in fp32."""
    d, e = work.decoder.hidden_size, work.element_bytes
    fused = work.device == "cuda" and not work.decoder.norm_unit_offset
    return _residual(work, kept) if fused else (5 if e != 4 else 4) * 4 * d * kept.residual_tokens


def _full_gradient(work: Workload) -> int:
    """Returns the bytes per element of a full gradient: ZeRO-1.5 adds them up in the dtype of the reduction."""
    return work.element_bytes if _is_fsdp(work) else work.gradient_bytes


def _residual(work: Workload, kept: KeptActivations) -> int:
    """Returns the bytes of the residual stream, or of its gradient."""
    return work.element_bytes * work.decoder.hidden_size * kept.residual_tokens


def _backward(work: Workload, kept: KeptActivations, kind: LayerKind) -> tuple[int, int]:
    """Returns what the backward pass of a layer needs at most, as ``Part.backward``."""
    decoder, e, d = work.decoder, work.element_bytes, work.decoder.hidden_size
    whole = layer_activations(replace(work, recomputed=0.0, keeps_attention=False), kept, kind._replace(recomputed=False))
    again = whole - layer_activations(work, kept, kind)
    residual, gradient = _residual(work, kept), e * d * kept.output_tokens
    gathered = gradient if kept.output_tokens != kept.residual_tokens else 0
    norm = residual + _norm_backward(work, kept)
    mlp, hidden, matrix = _mlp(work, kept, kind)
    heads, kv_heads = decoder.num_heads // kept.head_ranks, max(1, decoder.num_kv_heads // kept.head_ranks)
    kernel = 2 * e * decoder.head_dim * (kept.attention_tokens * heads + kept.key_tokens * kv_heads)
    if work.layout.context > 1:  # the last chunk of keys has gradients from both chunks of queries
        kernel += e * decoder.head_dim * kept.key_tokens * kv_heads // work.layout.context
    computed, stays = (0, hidden) if work.zero_bubble else (_full_gradient(work) * matrix, 0)
    rows = gradient
    if kind.sparse and decoder.experts is not None:
        rows = e * work.routed_tokens * decoder.experts.top_k * d
        gathered = 0
    apart = _is_fsdp(work) and kind.sparse and work.layout.experts_apart
    weights, ended = _gathered(work, kind.sparse, matrix)
    late = again if work.recomputed != "attention" else 0
    gathered += residual * (decoder.residual_multiplier != 1)  # the gradient of what is multiplied before it is added
    alike = [late + residual + gathered + hidden + computed + weights]  # the last linear of the MLP
    if apart:  # FSDP reduces them in a buffer as soon as they are complete
        alike.append(late - mlp + residual + 6 * computed)
    if decoder.out_norms:
        alike.append(late + norm)
    if late and kind.sparse:
        alike.append(late + residual + travelling(work, kind))
    if again:
        alike.append(residual + gathering(work, kept, kind))

    def most(first: bool) -> int:
        """``first``: whether the weights have no gradients yet."""
        after = gradient if work.zero_bubble else 3 * computed * first - mlp
        if apart:
            after = gradient - mlp + 3 * computed // work.layout.expert_zero
        return max(
            *alike,
            late + residual + 2 * hidden + stays + computed * first + weights,  # the activation of the MLP
            late + residual + 2 * rows + (stays - hidden) + (3 if first else 1) * computed + weights,  # gate and up
            late + after + residual + norm + ended,
            again + after + residual + gathered + kernel + ended,
        )

    return most(False), most(True)


def _gathered(work: Workload, sparse: bool, matrix: int) -> tuple[int, int]:
    """Returns the bytes of full weights and their full gradients in the backward pass of an MLP in isp, and after it.

    Args:
        matrix: the elements that a rank has of one of its three weights.
    """
    layout, e = work.layout, work.element_bytes
    ranks = layout.expert_inner if sparse else layout.weight
    if layout.mode != "isp" or ranks == 1:
        return 0, 0
    full = e * matrix * ranks
    if sparse:  # all three, those of the layer before, and the gradients
        ahead = 3 * full * work.prefetches_experts
        return 3 * full + ahead + 3 * full * (not work.zero_bubble), ahead
    in_flight = 3 * full * work.prefetches * (not work.zero_bubble)
    return (3 if work.prefetches else 2) * full + max(in_flight, 2 * full * (not work.zero_bubble)), in_flight


def _mlp(work: Workload, kept: KeptActivations, kind: LayerKind) -> tuple[int, int, int]:
    """Returns the bytes that the MLP of a layer keeps, those of its hidden activations, and the elements that a rank has of one
    of its three weights."""
    decoder, e = work.decoder, work.element_bytes
    experts = decoder.experts if kind.sparse else None
    if experts is None:
        hidden = e * decoder.intermediate_size * kept.mlp_tokens
        matrix = decoder.intermediate_size * decoder.hidden_size // _ranks(work)
        return 3 * hidden + e * decoder.hidden_size * kept.input_tokens, hidden, matrix
    rows, width = work.routed_tokens * experts.top_k, expert_width(work, experts)
    matrix = experts.count // work.layout.expert * experts.size * decoder.hidden_size // work.layout.expert_inner
    return e * rows * (2 * decoder.hidden_size + 3 * width), e * rows * width, matrix
