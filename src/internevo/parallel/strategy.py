"""What strategies have in common: the values in which each states its collectives and its memory, and what it tells others.

Each strategy's file has ``traffic(workload)`` and ``memory(workload)``; ``plan.py`` adds them up for a step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch.distributed as dist

from ..config import Config
from ..models.config import DecoderConfig
from .layout import Layout


@dataclass(frozen=True)
class Workload:
    """What a step computes, in numbers: all that its traffic and its memory depend on."""

    decoder: DecoderConfig
    layout: Layout
    tokens: int
    """Of a micro-batch, over all ranks of a tensor group."""
    micro_batches: int
    """Per step, on each data rank."""
    element: int
    """Bytes of one element of a weight, as it computes, and of an activation."""
    gradient: int
    """Bytes of one element of a gradient, as it is reduced."""
    share: float | Literal["attention"]
    """What is recomputed (``model.checkpoint``)."""
    keeps_attention: bool
    """Recomputation keeps the outputs of the attention kernel."""
    bucket: int | None
    """Elements of consecutive layers that ZeRO gathers and reduces together."""
    device: str = "cpu"

    @classmethod
    def of(cls, decoder: DecoderConfig, config: Config, layout: Layout, micro_batches: int, device: str = "cpu") -> Workload:
        """Of a run."""
        return cls(
            decoder, layout, config.data.seq_len * config.data.micro_bsz, micro_batches,
            4 if config.model.dtype in ("float32", "tf32") else 2,
            4 if config.hybrid_zero_optimizer.grad_dtype == "float32" else 2,
            config.model.checkpoint, config.selective_checkpoint, config.hybrid_zero_optimizer.reduce_bucket_size, device,
        )  # fmt: skip

    @property
    def recomputed_layers(self) -> int:
        """Layers that are recomputed as a whole."""
        return 0 if self.share == "attention" else int(self.decoder.num_layers * self.share)

    @property
    def recomputed_attentions(self) -> int:
        """Layers whose attention runs forward twice."""
        return self.decoder.num_layers if self.share == "attention" else self.recomputed_layers


@dataclass
class Collectives:
    """Collectives of one kind over groups of one axis.

    Bytes are those of the full tensor X of a collective (for all-to-all: of this rank's input).
    """

    kind: str
    axis: str
    """As in ``Layout.groups``, or "world"."""
    count: int = 0
    nbytes: int = 0
    seconds: float = 0.0
    """When measured: each waited for by itself, with nothing beside it."""

    def wire(self, ranks: int) -> float:
        """Bytes that a rank sends, in a group of ``ranks``: X * (n - 1) / n for all-gather, reduce-scatter and all-to-all, and
        twice that for all-reduce."""
        return self.nbytes * (ranks - 1) / ranks * (2 if self.kind == "all-reduce" else 1)

    def times(self, number: int) -> Collectives:
        """As many times as often."""
        return Collectives(self.kind, self.axis, self.count * number, self.nbytes * number)


def add_up(rows: Iterable[Collectives], layout: Layout) -> list[Collectives]:
    """One row for each kind and group, sorted; axes with the same groups are one, and those of one rank are left out."""
    groups, found = layout.groups(), dict[tuple[str, str], Collectives]()
    for row in rows:
        everyone = list(range(layout.world))
        ranks = everyone if row.axis == "world" else groups[row.axis][0] if row.axis in groups else [0]
        if len(ranks) > 1 and row.count:
            key = row.kind, layout.axis_of(row.kind, ranks)
            total = found.setdefault(key, Collectives(*key))
            total.count += row.count
            total.nbytes += row.nbytes
    return [found[key] for key in sorted(found)]


@dataclass(frozen=True)
class Kept:
    """How a strategy cuts what a layer keeps for backward: numbers of tokens on a rank, and shares of heads and columns."""

    outside: int
    """Tokens at norms and in the residual stream."""
    inputs: int
    """Tokens that are kept as the input of q, k and v, and of gate and up."""
    attention: int
    """Tokens inside attention."""
    head_ranks: int
    """Ranks that share the heads."""
    normed_heads: int
    """Tokens times heads of queries and keys, where these are normed."""
    columns: int
    """Tokens in the MLP, times this rank's share of its columns."""
    outputs: int
    """Times that the output of attention is kept."""
    loss: int
    """Tokens at the head."""
    head_rows: int
    """Rows of the head's weight whose gradient is here with the loss."""


@dataclass(frozen=True)
class Inner:
    """What a strategy inside a layer tells the data axis."""

    partial: Mapping[str, dist.ProcessGroup] = field(default_factory=dict)
    """Parameters that several inner ranks hold, and the group over which their gradients must still be summed."""
    strategy: CutsSequences | None = None


class CutsSequences(Protocol):
    """A strategy that may cut sequences."""

    cut: bool
