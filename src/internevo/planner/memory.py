"""The memory of the most loaded rank: what ``plan.memory`` says that it keeps, and how much more it has within a pass
(``peak``).

Attention that keeps its scores (``Job.keeps_scores``, others' measurements) keeps in addition for each pair of tokens and head
the output of the softmax, the mask of dropout, and the output of dropout: 5 bytes; and dropout of the residual stream two masks
of one byte for each element (Korthikanti et al., arXiv:2205.05198, section 4.1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from operator import mul

from ..parallel import plan
from ..parallel.kept import points
from ..parallel.memory import Memory, weights_and_gradients
from ..parallel.orders import BACKWARD, FORWARD, WEIGHTS
from ..parallel.strategy import Workload
from ..train.step import sums
from .job import Job
from .peak import peak


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


def most_loaded(job: Job, limit: float = math.inf) -> RankMemory:
    """Returns the memory of the pipeline rank that needs the most.

    The fullest moment is looked for on the rank that keeps the most, and on those with the embedding and the head.

    Args:
        limit: a rank that keeps more bytes than this is enough: neither other ranks nor its fullest moment are looked at.
    """
    works, keeps = dict[int, Workload](), dict[int, Memory]()
    for rank in range(job.work.layout.pipeline):
        works[rank] = job.on_rank(rank)
        keeps[rank] = plan.memory(works[rank])
        if keeps[rank].total > limit:
            return RankMemory(rank, keeps[rank], 0)
    most = max(keeps, key=lambda rank: keeps[rank].total)
    ranks = {most, *(rank for rank, work in works.items() if work.embeddings or work.heads)}
    return max((_of(job, works[rank], keeps[rank]) for rank in sorted(ranks)), key=lambda memory: memory.total)


def on_rank(job: Job, pipeline_rank: int) -> RankMemory:
    """Returns the memory of a rank."""
    work = job.on_rank(pipeline_rank)
    return _of(job, work, plan.memory(work))


def _of(job: Job, work: Workload, kept: Memory) -> RankMemory:
    largest = temporary(work, kept)
    kept = replace(kept, activations=kept.activations + sums(work.decoder, job.types))
    if job.keeps_scores:
        scores = _scores(job)
        kept = replace(kept, activations=kept.activations + scores * _layers_kept(work))
        largest += scores * bool(work.recomputed_attentions)
    return RankMemory(work.pipeline_rank, kept, largest)


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


def temporary(work: Workload, kept: Memory) -> int:
    """Returns how much more a rank has at its fullest moment than what it keeps after the pass that leaves the most. With Muon,
    this may be the update of the weights."""
    return max(0, max(peak(work), _update(work)) - kept.state - kept.activations)


def _update(work: Workload) -> int:
    """Returns what a rank has while Muon updates the weights, besides master weights and moments; 0 without it."""
    if not work.layout.muon:
        return 0
    passes = (FORWARD + BACKWARD + WEIGHTS * work.zero_bubble) * work.micro_batches
    elements = [plan.elements(replace(work, stages=(stage,))) for stage in work.on_rank]
    return sum(weights_and_gradients(work, its, passes) for its in elements) + plan.update_bytes(work)
