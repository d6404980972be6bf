"""The arithmetic and the memory traffic of each module, as it is computed on one rank: FLOPs and bytes, no times.

T tokens of a micro-batch, D hidden size, N query and K key/value heads of size H, F width of the MLP, V vocabulary, E experts
of width X of which a token chooses k, t ranks of the tensor axis, A tokens that a token attends to on average (S/2 in a row of
S tokens that is one document: the kernel leaves out what the causal mask hides).

| module          | forward FLOPs on a rank       | backward | source                                             |
|-----------------|-------------------------------|----------|----------------------------------------------------|
| q, k, v, o      | 2 T D H (2N + 2K) / t         | 2 times  | PaLM, arXiv:2204.02311, appendix B                 |
| attention       | 4 T N H A / t                 | 2.5      | FlashAttention-2, arXiv:2307.08691, section 4.1    |
| latents         | 2 T D R / t; mtp: 2 T D R     | 2        | R: sizes of latents (arXiv:2405.04434, section 2.1)|
| MLP             | 6 T D F / t                   | 2        |                                                    |
| router, experts | 2 T D E + 6 T k D X, shared t | 2        | rows of the rank's experts, times their imbalance  |
| head            | 2 T D V / t                   | 2        |                                                    |

The backward pass of attention computes the scores again, so that it has 5 products in place of 2. A linear of M rows, K columns
in and N out moves M K + K N + M N elements; its backward pass twice that, and the gradient of the weight in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ..models.config import DecoderConfig
from .job import Again, Job

SCORE_BYTES = 11
"""If attention keeps its scores (``Job.keeps_scores``): bytes that its forward pass moves for each pair of tokens and head. The
product writes scores in 2 bytes, softmax and dropout read and write them, with a mask of 1 byte, and a product reads them."""
WITHOUT_TENSOR_CORES = 4
"""How much slower products are whose rows are no multiple of 16 bytes, if attention keeps its scores: they do not run on tensor
cores (NVIDIA's guide of matrix products; the data sheet of an A100 says 312 and 78 TFLOPS in 16 bits)."""
FUSED = 0.6
"""The share of the bytes that compiled kernels move, which keep results between them in registers."""


class Amounts(NamedTuple):
    """What kernels have to do."""

    products: float = 0.0
    """FLOPs of matrix products of the layers."""
    head: float = 0.0
    """FLOPs of matrix products that are never in fp8: of the head and of routers."""
    moved: float = 0.0
    """Bytes that matrix products read and write."""
    attention: float = 0.0
    """FLOPs of the attention kernel."""
    memory: float = 0.0
    """Bytes that other kernels read and write."""
    kernels: float = 0.0
    """Number of kernels."""

    def plus(self, other: Amounts, times: float = 1.0) -> Amounts:
        """Returns the sum with ``times`` the other."""
        return Amounts(*(a + times * b for a, b in zip(self, other, strict=True)))


Linears = tuple[float, float, float, float]
"""Rows, columns in, columns out, and how many of them."""


class Passes(NamedTuple):
    """A forward pass, and the parts of a backward pass."""

    forward: Amounts
    inputs: Amounts
    """Of the gradients of inputs."""
    weights: Amounts
    """Of the gradients of weights."""
    again: Amounts
    """Of recomputation."""


def layer(job: Job, number: int, recomputed: bool) -> Passes:
    """Returns what one micro-batch costs in a layer, on one rank."""
    work, decoder, layout = job.work, job.work.decoder, job.work.layout
    e, d, t = work.element_bytes, decoder.hidden_size, layout.tensor
    own = work.tokens / t  # this rank's tokens, if the sequence is sharded
    rows, width = (own, 1) if layout.mode == "isp" else (work.tokens, t)  # of linears: tokens, and ranks that share columns
    residual = own if layout.shards_sequence else work.tokens
    heads, kv = decoder.num_heads * decoder.head_dim, decoder.num_kv_heads * decoder.head_dim
    attention = list(_attention_linears(decoder, rows, residual if width > 1 else rows, width))
    mlp, routers, mlp_bytes = _mlp_linears(job, number, rows, width)
    kernel, kernel_backward, scores = _attention(job, number)
    # Norms read and write D elements, the sums of the residual stream read 2 D and write D; the rotary embedding; gate * up.
    rotated = 2 * (heads + kv) * work.tokens / t * (decoder.rotary(number) != "none")
    # Context ranks copy the keys and values of all tokens: as they are gathered, in the order of the row, and their gradients.
    gathered = 2 * 4 * work.tokens * kv / layout.head * (layout.context > 1)
    outside = e * (10 * d * residual + rotated + gathered) + mlp_bytes + scores
    outside *= FUSED if job.compiled else 1.0
    count, linears = 12.0 + (12.0 if decoder.is_sparse(number) else 3.0), _linears([*attention, *mlp], e)
    forward = linears._replace(attention=kernel, memory=outside, kernels=count).plus(routers)
    inputs = linears._replace(attention=kernel_backward, memory=2 * outside, kernels=count).plus(routers)
    written = 8.0 * sum(columns_in * columns_out * times for _, columns_in, columns_out, times in (*attention, *mlp))
    weights = linears._replace(memory=written, kernels=count / 2).plus(routers)
    return Passes(forward, inputs, weights, _again(job, forward, attention, mlp, recomputed))


def _attention(job: Job, number: int) -> tuple[float, float, float]:
    """Returns the FLOPs of attention in the forward and in the backward pass, and the bytes of scores in the forward pass."""
    work, decoder = job.work, job.work.decoder
    heads, t = decoder.num_heads, work.layout.tensor
    if not job.keeps_scores:
        forward = 4.0 * work.tokens * heads * decoder.head_dim / t * job.attended(number)
        return forward, 2.5 * forward, 0.0
    pairs = float(work.tokens * job.seq_len * heads / t)  # also those that the causal mask hides
    forward = 4.0 * pairs * decoder.head_dim * (WITHOUT_TENSOR_CORES if decoder.head_dim % 8 else 1)
    return forward, 2.0 * forward, SCORE_BYTES * pairs


def _again(job: Job, forward: Amounts, attention: Sequence[Linears], mlp: Sequence[Linears], recomputed: bool) -> Amounts:
    """Returns what is recomputed of a layer: until the input of the last linear is there."""
    work = job.work
    if job.again is not None:
        share = job.again
    elif work.recomputed == "attention":
        linears = _linears(attention[:-1], work.element_bytes).products / max(forward.products, 1.0)
        share = Again(linears, 0.0 if work.keeps_attention else 1.0, 0.3)
    elif recomputed:
        last = _linears(mlp[-1:], work.element_bytes).products / max(forward.products, 1.0)
        share = Again(1.0 - last, 0.0 if work.keeps_attention else 1.0, 1.0)
    else:
        return Amounts()
    return Amounts(
        forward.products * share.products, forward.head * share.products, forward.moved * share.products,
        forward.attention * share.attention, forward.memory * share.memory, forward.kernels * max(share),
    )  # fmt: skip


def _attention_linears(decoder: DecoderConfig, rows: float, own_rows: float, width: float) -> Iterator[Linears]:
    """Yields (rows, columns in, columns out, how many) of the linears of attention.

    Args:
        own_rows: rows of linears that have no heads.
        width: ranks that share heads. Each has at least one key/value head.
    """
    for name, linear in decoder.projections().items():
        columns_in, columns_out = float(linear.inputs), float(linear.outputs)
        if linear.heads == 0:
            columns_out = max(columns_out / width, decoder.head_dim if name in ("k", "v") else 0.0)
        elif linear.heads == 1:
            columns_in /= width
        yield own_rows if linear.heads is None else rows, columns_in, columns_out, 1


def _mlp_linears(job: Job, number: int, rows: float, width: float) -> tuple[list[Linears], Amounts, float]:
    """Returns the linears of an MLP or of experts, with the router apart, and the bytes of what is around them."""
    work, decoder, layout = job.work, job.work.decoder, job.work.layout
    e, d, experts = work.element_bytes, decoder.hidden_size, job.work.decoder.experts
    if experts is None or not decoder.is_sparse(number):
        columns = decoder.intermediate_size / width
        return [(rows, d, columns, 2), (rows, columns, d, 1)], Amounts(), 3.0 * e * rows * columns
    routed, local = work.routed_tokens * experts.top_k * job.imbalance, experts.count / layout.expert
    columns = experts.size / layout.tensor if layout.experts_by_tensor else float(experts.size)
    each = routed / local
    linears = [(each, d, columns, 2 * local), (each, columns, d, local)]
    # Rows are copied to the order of the experts and back, gate * up, and the weighted sum of a token's choices.
    around = e * routed * (6 * d + 3 * columns) + 4.0 * work.routed_tokens * (d + 3 * experts.count)
    if experts.shared_size:
        shared = experts.shared_size / width
        linears += [(rows, d, shared, 2), (rows, shared, d, 1)]
        around += 3.0 * e * rows * shared
    return linears, Amounts(head=2.0 * work.routed_tokens * d * experts.count), around


def _linears(linears: Sequence[Linears], e: int) -> Amounts:
    """Adds up matrix products: (rows, columns in, columns out, how many) of each."""
    flops = sum(2.0 * m * k * n * times for m, k, n, times in linears)
    return Amounts(products=flops, moved=e * sum((m * k + k * n + m * n) * times for m, k, n, times in linears))


def head(job: Job) -> Passes:
    """Returns what one micro-batch costs in the last norm, the head and the loss. Gradients are computed with the loss."""
    work, decoder, layout = job.work, job.work.decoder, job.work.layout
    d, v, t, e = decoder.hidden_size, decoder.vocab_size, layout.tensor, work.element_bytes
    rows, columns = (work.tokens / t, float(v)) if layout.mode == "isp" else (float(work.tokens), v / t)
    once = _linears([(rows, d, columns, 1)], e)
    forward = Amounts(0.0, once.products, once.moved, 0.0, 12.0 * rows * columns + 2 * e * d * rows, 6.0)
    return Passes(
        forward,
        Amounts(0.0, once.products, once.moved, 0.0, 2.0 * e * d * rows, 2.0),
        Amounts(0.0, once.products, once.moved, 0.0, 8.0 * d * columns, 2.0),
        Amounts(),
    )


def update(job: Job, layers: range) -> Amounts:
    """Returns what Muon costs on a rank in the layers of a stage: an iteration of a matrix has two products with its longer
    side, and one of its shorter side alone. The ranks of a stage share the matrices; one has at least the largest."""
    decoder, e, layout, found = job.work.decoder, job.work.decoder.experts, job.work.layout, list[tuple[int, int, int]]()
    ranks, d = layout.world // layout.pipeline, decoder.hidden_size
    for number in layers:
        found += [(linear.outputs, linear.inputs, 1) for linear in decoder.projections().values()]
        sparse = e is not None and decoder.is_sparse(number)
        widths = [(e.size, 3 * e.count), (e.shared_size, 3)] if e is not None and sparse else [(decoder.intermediate_size, 3)]
        found += [(width, d, times) for width, times in widths if width]
    flops = [(2.0 * min(m, n) ** 2 * (2 * max(m, n) + min(m, n)) * job.iterations, times) for m, n, times in found]
    most = max(sum(each * times for each, times in flops) / ranks, max((each for each, _ in flops), default=0.0))
    return Amounts(products=most, kernels=4.0 * job.iterations * max(1.0, sum(times for *_, times in found) / ranks))


def stage(job: Job, layers: range, heads: bool) -> Passes:
    """Returns what one micro-batch costs in a stage. Layers of one kind are counted once."""
    decoder, recomputed = job.work.decoder, job.work.recomputed
    first = 0 if isinstance(recomputed, str) else int(len(layers) * recomputed)
    kinds: dict[tuple[tuple[bool, int, str], bool], list[int]] = {}
    for place, number in enumerate(layers):
        kinds.setdefault((decoder.kind(number), place < first), []).append(number)
    total = Passes(Amounts(), Amounts(), Amounts(), Amounts())
    parts = [(layer(job, numbers[0], again), len(numbers)) for (_, again), numbers in kinds.items()]
    for passes, times in [*parts, *([(head(job), 1)] if heads else [])]:
        total = Passes(*(a.plus(b, times) for a, b in zip(total, passes, strict=True)))
    return total
