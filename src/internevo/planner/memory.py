"""The memory of the most loaded rank: what ``plan.memory`` says that it keeps, and in addition the largest temporary buffers.

| temporary               | bytes                                                                                         |
|-------------------------|-----------------------------------------------------------------------------------------------|
| a layer's backward pass | gradients of gate, up, their product and the residual stream; if the layer is recomputed, all |
|                         | of its activations                                                                            |
| the head                | a chunk of logits in fp32, and its gradient                                                   |
| FSDP                    | the full weights of two units (in use, and gathered in advance), the full gradient of one     |

They do not exist at the same time; the largest counts, with those of FSDP.

Attention that keeps its scores (``Job.keeps_scores``, others' measurements) keeps in addition for each pair of tokens and head
the output of the softmax, the mask of dropout, and the output of dropout: 5 bytes; and dropout of the residual stream two masks
of one byte for each element (Korthikanti et al., arXiv:2205.05198, section 4.1).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from operator import mul

from .. import ops
from ..parallel import isp, plan, tensor
from ..parallel.kept import points
from ..parallel.memory import Memory, activations, expert_width
from ..parallel.strategy import Workload
from .job import Job


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank."""

    pipeline_rank: int
    kept: Memory
    temporary: int

    @property
    def total(self) -> int:
        """The sum."""
        return self.kept.total + self.temporary


def most_loaded(job: Job) -> RankMemory:
    """Returns the memory of the pipeline rank that needs the most."""
    return max((on_rank(job, rank) for rank in range(job.work.layout.pipeline)), key=lambda memory: memory.total)


def on_rank(job: Job, pipeline_rank: int) -> RankMemory:
    """Returns the memory of a rank."""
    work = job.on_rank(pipeline_rank)
    kept, largest = plan.memory(work), temporary(work)
    if job.keeps_scores:
        scores = _scores(job)
        kept = replace(kept, activations=kept.activations + scores * _layers_kept(work))
        largest += scores * bool(work.recomputed_attentions)
    return RankMemory(pipeline_rank, kept, largest)


def _scores(job: Job) -> int:
    """Returns the bytes that attention and dropout keep in a layer for a micro-batch, besides what InternEvo's keep."""
    work, decoder = job.work, job.work.decoder
    heads = decoder.num_heads // work.layout.tensor
    residual = work.tokens // (work.layout.tensor if work.layout.shards_sequence else 1)
    return 5 * work.tokens * job.seq_len * heads + 2 * decoder.hidden_size * residual


def _layers_kept(work: Workload) -> int:
    """Returns for how many layers and micro-batches together a rank keeps activations at most; recomputed layers are none."""
    layout, again = work.layout, set(work.recomputed_layers)
    layers = [len(set(stage.layers) - again) for stage in work.on_rank]
    kept = points(work.schedule, layout.pipeline, layout.chunks, work.micro_batches, work.pipeline_rank)
    return max(sum(map(mul, layers, point.forward)) for point in kept)


def temporary(work: Workload) -> int:
    """Returns the bytes of the largest temporary buffers of a rank."""
    decoder, layout, e = work.decoder, work.layout, work.element_bytes
    kept = (isp if layout.mode == "isp" else tensor).memory(work)
    width = decoder.intermediate_size
    if decoder.experts is not None and any(decoder.is_sparse(layer) for layer in work.layers):
        rows = work.routed_tokens * decoder.experts.top_k
        mlp = e * rows * (2 * decoder.hidden_size + 3 * expert_width(work, decoder.experts))
    else:
        mlp = e * 3 * width * kept.mlp_tokens
    backward = mlp + 2 * e * decoder.hidden_size * kept.input_tokens
    if work.recomputed_attentions:
        first = work.on_rank[0]
        one = replace(first, layers=range(first.layers[0], first.layers[0] + 1), embeds=False, heads=False)
        backward += activations(replace(work, stages=(one,), recomputed=0.0), kept)
    columns = decoder.vocab_size if layout.mode == "isp" else decoder.vocab_size // layout.tensor
    logits = 8 * ops.chunk_tokens(kept.loss_tokens, columns, work.device) * columns * work.heads
    return max(backward, logits) + (_gathered(work) if layout.fsdp else 0)


def _gathered(work: Workload) -> int:
    """Returns the bytes of the weights and gradients that FSDP has in full."""
    decoder, inner = work.decoder, work.layout.inner
    elements = max(decoder.layer_parameters(layer) for layer in work.layers)
    if decoder.experts is not None and work.layout.experts_apart:
        elements //= work.layout.expert
    elements = elements // inner
    ends = decoder.vocab_size * decoder.hidden_size // inner * bool(work.embeddings or work.heads)
    return work.element_bytes * (2 * elements + max(elements, ends)) + work.gradient_bytes * max(elements, ends)
