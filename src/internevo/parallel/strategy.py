"""What all strategies share: the values in which a strategy states its collectives and its memory, and what ``apply`` returns.

The file of a strategy has the functions ``traffic(work)`` and ``memory(work)``. ``plan.py`` adds up the results of all
strategies of a step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, Protocol

import torch.distributed as dist

from ..config import Config
from ..models.config import DecoderConfig, Stage
from ..models.losses import LossTerms
from .layout import Layout
from .stages import split


class LayerKind(NamedTuple):
    """What decides about the memory of a layer."""

    sparse: bool
    """Whether it has experts."""
    recomputed: bool
    """Whether it is recomputed as a whole."""
    windowed: bool
    """Whether its attention has a window."""


@dataclass(frozen=True)
class Workload:
    """The sizes of a step. The collectives and the memory of a step follow from them."""

    decoder: DecoderConfig
    layout: Layout
    tokens: int
    """Tokens of a micro-batch. The ranks of a tensor group share them."""
    micro_batches: int
    """Micro-batches per step on each data rank."""
    element_bytes: int
    """Bytes per element of activations, and of weights in the dtype of the computation."""
    gradient_bytes: int
    """Bytes per element of gradients when they are reduced."""
    recomputed: float | Literal["attention"]
    """What is recomputed (``model.checkpoint``): a share of the layers, or "attention"."""
    keeps_attention: bool
    """Whether recomputation keeps the outputs of the attention kernel (``selective_checkpoint``)."""
    bucket_elements: int | None
    """Consecutive layers with up to this many elements form one unit of ZeRO; None: each layer is a unit."""
    device: str = "cpu"
    stages: tuple[Stage, ...] = ()
    """The stages of the rank whose collectives and memory are asked for. Empty: the whole model."""
    pipeline_rank: int = 0
    """The place of this rank in its pipeline."""
    zero_rank: int = 0
    """The place of this rank among those over which the optimizer state is sharded."""
    expert_zero_rank: int = 0
    """The same for experts."""
    rank: int = 0
    """The rank whose collectives are asked for, in the world."""
    loss: LossTerms = field(default_factory=LossTerms)
    """The weights of the terms of the loss."""
    rows: int = 0
    """Rows of a micro-batch, if they are not packed into one row; 0: they are."""
    prefetches: bool = False
    """isp: whether the next weights are gathered while others are used (``parallel.weight.overlap``)."""
    prefetches_experts: bool = False
    """The same for experts (``parallel.expert_weight.overlap``)."""

    @classmethod
    def from_config(
        cls, decoder: DecoderConfig, config: Config, layout: Layout, micro_batches: int, device: str = "cpu", rank: int = 0
    ) -> Workload:
        """Takes the sizes from a run's config.

        Args:
            micro_batches: micro-batches per step on each data rank.
            device: type of the device that the run trains on, "cpu" or "cuda".
            rank: the rank whose collectives and memory are asked for.
        """
        stages = split(decoder, layout.stages, config.data.seq_len, config.parallel.pipeline.layers)
        mine = layout.weights.coordinate(rank)["stage"]
        return cls(
            decoder, layout, config.data.seq_len * config.data.micro_bsz, micro_batches,
            4 if config.model.dtype in ("float32", "tf32") else 2,
            4 if config.hybrid_zero_optimizer.grad_dtype == "float32" else 2,
            config.model.checkpoint, config.selective_checkpoint, config.hybrid_zero_optimizer.reduce_bucket_size, device,
            tuple(stage for number, stage in enumerate(stages) if layout.rank_of_stage(number) == mine),
            mine,
            layout.weights.coordinate(rank)["zero"],
            layout.experts.coordinate(rank)["zero"],
            rank,
            LossTerms.from_config(config.loss),
            0 if config.data.use_packed_dataset else config.data.micro_bsz,
            config.parallel.weight.overlap,
            config.parallel.expert_weight.overlap,
        )  # fmt: skip

    @property
    def on_rank(self) -> tuple[Stage, ...]:
        """The stages of the rank."""
        return self.stages or (Stage(range(self.decoder.num_layers)),)

    @property
    def schedule(self) -> str:
        """The schedule, as for ``orders.orders``."""
        return self.layout.schedule if self.layout.pipeline > 1 else "1F1B"

    @property
    def zero_bubble(self) -> bool:
        """Whether the schedule computes the gradients of weights apart from the backward passes."""
        return self.schedule != "1F1B"

    @property
    def pooled_bytes(self) -> int:
        """Bytes that the stages hand on besides the residual stream, if the loss depends on the routers of all layers together
        (``losses.add_pooled``)."""
        return 8 * self.decoder.experts.count if self.decoder.experts and self.loss.pools(self.decoder) else 0

    @property
    def routed_tokens(self) -> int:
        """The tokens of a micro-batch that a rank sends through its routers."""
        return self.tokens if self.layout.experts_by_tensor else self.tokens // self.layout.tensor

    @property
    def sums_routers(self) -> bool:
        """Whether the ranks of a tensor group add up what their routers have counted."""
        return not self.layout.experts_by_tensor and self.layout.tensor > 1

    @property
    def layers(self) -> list[int]:
        """The numbers of the layers of the rank."""
        return [layer for stage in self.on_rank for layer in stage.layers]

    @property
    def embeddings(self) -> int:
        """1 if the rank has the embedding, else 0."""
        return sum(stage.embeds for stage in self.on_rank)

    @property
    def heads(self) -> int:
        """1 if the rank has the head, else 0."""
        return sum(stage.heads for stage in self.on_rank)

    @property
    def recomputed_layers(self) -> list[int]:
        """The layers of the rank that are recomputed as a whole: the first ones of each stage."""
        if self.recomputed == "attention":
            return []
        return [layer for stage in self.on_rank for layer in stage.layers[: int(len(stage.layers) * self.recomputed)]]

    @property
    def kinds(self) -> list[LayerKind]:
        """What the layers of the rank are."""
        decoder, again = self.decoder, set(self.recomputed_layers)
        return [LayerKind(decoder.is_sparse(layer), layer in again, decoder.window(layer) > 0) for layer in self.layers]

    @property
    def recomputed_attentions(self) -> int:
        """The number of layers whose attention is recomputed, alone or with the whole layer."""
        return len(self.layers if self.recomputed == "attention" else self.recomputed_layers)


@dataclass
class Collectives:
    """Collectives of one kind over the groups of one axis."""

    kind: str
    axis: str
    """A key of ``Layout.groups``, or "world"."""
    count: int = 0
    nbytes: int = 0
    """Bytes of the full tensor X of each collective, added up (of an all-to-all and of a send: of this rank's input)."""
    seconds: float = 0.0
    """The measured time, if each collective is waited for before anything else runs."""

    def wire(self, ranks: int) -> float:
        """Returns the bytes that a rank sends in groups of ``ranks``: X * (ranks - 1) / ranks, twice that for all-reduce."""
        if self.kind == "send":
            return self.nbytes
        return self.nbytes * (ranks - 1) / ranks * (2 if self.kind == "all-reduce" else 1)

    def times(self, number: int) -> Collectives:
        """Returns ``number`` times these collectives."""
        return Collectives(self.kind, self.axis, self.count * number, self.nbytes * number)


def add_up(rows: Iterable[Collectives], layout: Layout) -> list[Collectives]:
    """Adds up collectives of the same kind over the same groups, and sorts them.

    Axes with the same groups become one axis. Collectives over groups of one rank are left out.
    """
    groups, everyone, placed = layout.groups_of(0), list(range(layout.world)), list[Collectives]()
    for row in rows:
        ranks = everyone if row.axis == "world" else groups.get(row.axis, [0])
        if len(ranks) > 1 and row.count:
            placed.append(replace(row, axis=layout.axis_of(row.kind, ranks)))
    return added_up(placed)


def added_up(rows: Iterable[Collectives]) -> list[Collectives]:
    """Adds up collectives of the same kind over the same axis, and sorts them."""
    found = dict[tuple[str, str], Collectives]()
    for row in rows:
        total = found.setdefault((row.kind, row.axis), Collectives(row.kind, row.axis))
        total.count += row.count
        total.nbytes += row.nbytes
        total.seconds += row.seconds
    return [found[key] for key in sorted(found)]


@dataclass(frozen=True)
class KeptActivations:
    """How many tokens, heads and columns a rank keeps for the backward pass at each place in a layer."""

    residual_tokens: int
    """Tokens in the residual stream and at the norms."""
    input_tokens: int
    """Tokens that are kept as the input of q, k and v, and as the input of gate and up."""
    attention_tokens: int
    """Tokens whose queries a rank has in attention."""
    key_tokens: int
    """Tokens whose keys and values it has there."""
    head_ranks: int
    """Number of ranks that share the heads."""
    normed_heads: int
    """Tokens times heads of queries and keys, for models that norm them."""
    mlp_tokens: int
    """Tokens in the MLP times this rank's share of its columns."""
    attention_outputs: int
    """How many times the output of attention is kept."""
    loss_tokens: int
    """Tokens whose loss this rank computes."""
    output_tokens: int
    """Tokens in the gradients of the outputs of attention and MLP, from which those of weights are computed."""
    head_rows: int
    """Rows of the head's weight whose gradient this rank has; it is computed together with the loss."""
    looked_up: int = 0
    """Bytes that the embedding keeps."""
    shared_latents: int = 0
    """Tokens whose latents are joined for all heads, in latent attention; 0: they are kept as they are computed."""


@dataclass(frozen=True)
class AppliedStrategy:
    """What the data axis must know about the strategies that were applied inside the layers."""

    partial_gradients: Mapping[str, dist.ProcessGroup] = field(default_factory=dict)
    """Parameters whose gradients must still be summed over a group of ranks -> that group."""
    strategies: tuple[ShardsSequence, ...] = ()

    def __add__(self, other: AppliedStrategy) -> AppliedStrategy:
        """Returns both together."""
        summed = {**self.partial_gradients, **other.partial_gradients}
        return AppliedStrategy(summed, (*self.strategies, *other.strategies))


class ShardsSequence(Protocol):
    """A strategy that may shard sequences over ranks."""

    shard_sequence: bool
    """Whether it does so now. Generation turns it off."""
