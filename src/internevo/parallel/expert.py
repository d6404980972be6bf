"""Expert parallel: the experts of a layer are divided among ranks, and tokens travel to them (https://arxiv.org/abs/2006.16668).

``n`` ranks of the expert axis have ``E / n`` experts each. Each of them has other tokens; a rank sends every row (a token with
one of its choices) to the rank of its expert, and gets it back. A shared expert computes while rows travel.

    gate, up, down of experts  [E, out, in]   sharded along E over the expert axis
    router, gate of the shared expert         replicated

How it goes together with the tensor axis of ``t`` ranks:

| tensor mode              | an expert is                                       | a rank routes and sends            |
|--------------------------|----------------------------------------------------|------------------------------------|
| mtp, msp, fsp            | sharded over the tensor axis as an MLP: gate and   | all S tokens, as do the other      |
|                          | up along out, down along in                        | t - 1 ranks; the outputs are added |
| mtp, msp, fsp with no_tp | whole                                              | its S/t tokens                     |
| isp                      | sharded over ``expert_weight`` ranks, and gathered | its S/t tokens                     |
|                          | for use, one layer with experts ahead              |                                    |

Per layer with experts and micro-batch, with R rows on a rank, and W = bytes of the experts of a rank before they are sharded:

| group         | forward                                             | backward                                        |
|---------------|-----------------------------------------------------|-------------------------------------------------|
| expert        | 1 all-to-all of E counts; 2 all-to-all of R rows    | 2 all-to-all of R rows                          |
| expert weight | 1 all-gather of W                                   | 1 all-gather of W, 1 reduce-scatter of W        |
| tensor, with  | with capacity: 1 all-gather of the tokens' choices; |                                                 |
| S/t tokens    | mtp: 1 all-gather of the experts' output            | mtp: 1 all-gather of its input's gradient       |

Routing is by the micro-batch of a data rank: which tokens are dropped and the losses of the routers do not depend on the
layout. Ranks with S/t tokens gather the choices of all tokens to know what is dropped, and sum up what the routers of all
layers have counted in one all-reduce per micro-batch and stage. The data axis shards the optimizer state of experts over the
ranks that have the same ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.tensor import Shard, distribute_tensor

from .. import ops
from ..models.decoder import Decoder
from ..models.moe import ExpertLinear, ExpertMLPs, MoE, Routing
from ..ops.compiler import not_compiled
from . import gathered
from .collectives import Group, Travel, all_gather, all_to_all, join_tokens, reduce, share_tokens, tokens_first
from .context import TokenOrder
from .deferred import Deferred
from .gathered import GatheredWeights, set_prefetch_order_of_experts
from .layout import Layout, Meshes
from .shards import local, shard_dim_of_experts
from .strategy import AppliedStrategy, Collectives, Workload


def traffic(work: Workload) -> list[Collectives]:
    """Returns the collectives of the layers with experts in a step, without those that a dense layer has too.

    Without dropped tokens, a rank sends all its rows; how many it gets depends on the router, and is stated as the same number.
    """
    layout, decoder, experts = work.layout, work.decoder, work.decoder.experts
    layers = [layer for layer in work.layers if decoder.is_sparse(layer)]
    if experts is None or not layers:
        return []
    again = len([layer for layer in layers if layer in work.recomputed_layers])
    forwards, d, e = len(layers) + again, decoder.hidden_size, work.element_bytes
    moved = 2 * (forwards + len(layers))
    nbytes = moved * work.routed_tokens * experts.top_k * d * e + forwards * 4 * experts.count
    weights = 3 * experts.count // layout.expert * experts.size * d * e
    rows = [Collectives("all-to-all", "expert", moved + forwards, nbytes)]
    if layout.mode == "isp":
        axis = "expert weight" if layout.experts_apart else "weight"
        rows.append(Collectives("all-gather", axis, 2 * len(layers), 2 * len(layers) * weights))
        rows.append(Collectives("reduce-scatter", axis, len(layers), len(layers) * weights))
    if not layout.experts_by_tensor:
        sums = sum(any(decoder.is_sparse(layer) for layer in stage.layers) for stage in work.on_rank)
        rows.append(Collectives("all-reduce", "tensor", sums, len(layers) * (3 * experts.count + 3) * 4))
        choices = forwards * (experts.capacity_factor > 0)
        rows.append(Collectives("all-gather", "tensor", choices, choices * work.tokens * experts.top_k * 8))
        if layout.mode == "mtp":
            joined = 2 * len(layers)  # recomputation ends before the outputs of the experts are joined
            rows.append(Collectives("all-gather", "tensor", joined, joined * work.tokens * d * e))
    return [row.times(work.micro_batches) for row in rows]


def shape_on_rank(shape: Sequence[int], axes: Sequence[str], layout: Layout) -> tuple[int, ...]:
    """Returns the shape of a rank's shard of the weights of experts."""
    local_shape = [shape[0] // layout.expert, *shape[1:]]
    local_shape[inner_dim(local_shape, axes, layout)] //= layout.expert_inner
    return tuple(local_shape)


def inner_dim(shape: Sequence[int], axes: Sequence[str], layout: Layout) -> int:
    """Returns the dimension along which each expert is sharded.

    Args:
        shape: the shape of the weights of a rank's experts before they are.
    """
    return axes.index("mlp") if layout.mode != "isp" else shard_dim_of_experts(shape, layout.expert_inner)


class ExpertParallel:
    """Divides the experts of a model among ranks, shards them, and sends tokens to them."""

    def __init__(self, layout: Layout, meshes: Meshes, overlap: bool, deferred: Deferred | None = None) -> None:
        """
        Args:
            overlap: whether experts that are gathered for use are prefetched.
            deferred: where the gradients of weights are left, if the schedule computes them later.
        """
        self.layout, self.overlap, self.deferred = layout, overlap, deferred
        self.mesh, tensor = meshes.experts or meshes.weights, meshes.tensor
        self.token_group, self.order = tensor.get_group(), TokenOrder.of(layout, tensor.get_local_rank())
        self.shard_sequence = not layout.experts_by_tensor and layout.tensor > 1
        """Whether a rank of the tensor group routes its own tokens only. It is turned off for generation."""

    def apply(self, model: Decoder) -> AppliedStrategy:
        """Shards the experts and replaces the functions of their layers, in place. The model must be on the meta device."""
        prefetched = list[GatheredWeights]()
        for _, layer in model.numbered_layers():
            moe = layer.mlp
            if not isinstance(moe, MoE):
                continue
            experts = moe.experts
            linears = [experts.gate, experts.up, experts.down]
            dims = [self._shard(linear) for linear in linears]
            if self.layout.expert > 1:
                moe.run_experts = partial(run_experts, self.mesh["expert"].get_group())
            if self.layout.mode == "isp" and self.layout.expert_inner > 1:
                weights = GatheredWeights(layer, linears, self.mesh["inner"].get_group(), self.deferred, dims)
                weights.unit = experts if self.layout.experts_apart else layer
                experts.mlps = partial(gathered.mlps, weights)
                prefetched.append(weights)
            if self.shard_sequence:
                moe.router.all_tokens, moe.router.own_tokens = self._all_tokens, self._own_tokens
                if self.layout.mode == "mtp":
                    moe.routed = partial(self._routed, moe)
        set_prefetch_order_of_experts(prefetched, self.overlap)
        if self.shard_sequence:
            model.pool = self._pool
        return AppliedStrategy(strategies=(self,))

    def _shard(self, linear: ExpertLinear) -> int:
        """Shards the weights of experts over the expert axis and the inner one. Returns the dimension of the latter."""
        count, *size = linear.weight.shape
        dim = inner_dim([count // self.layout.expert, *size], linear.axes, self.layout)
        sharded = {"expert": Shard(0)} if self.layout.expert > 1 else {}
        sharded |= {"inner": Shard(dim)} if self.layout.expert_inner > 1 else {}
        if sharded:
            mesh, placements = self.mesh[tuple(sharded)], list(sharded.values())
            weight = distribute_tensor(linear.weight.data, mesh, placements, src_data_rank=None)
            linear.register_parameter("weight", nn.Parameter(weight))
            linear.local_part = local
        return dim

    # The functions that replace those of the layers, if ranks of a tensor group route their own tokens ----------------------

    def _all_tokens(self, probs_BSk: Tensor, experts_BSk: Tensor) -> tuple[Tensor, Tensor]:
        if not self.shard_sequence:
            return probs_BSk, experts_BSk
        both = torch.cat([probs_BSk, experts_BSk.to(probs_BSk.dtype)], dim=-1)
        gathered = all_gather(tokens_first(both), self.token_group)
        probs, experts = self.order.of_ranks(gathered).transpose(0, 1).chunk(2, dim=-1)
        return probs, experts.to(experts_BSk.dtype)

    def _own_tokens(self, values_BSk: Tensor) -> Tensor:
        return self.order.own(values_BSk) if self.shard_sequence else values_BSk

    def _routed(self, moe: MoE, x_BSD: Tensor, meanwhile: Callable[[], Tensor | None]) -> tuple[Tensor, Tensor | None, Routing]:
        """mtp: each rank has all tokens, and routes a part of them."""
        if not self.shard_sequence:
            return moe.run_routed(x_BSD, meanwhile)
        out_BSD, other, routing = moe.run_routed(share_tokens(x_BSD, self.token_group), meanwhile)
        return join_tokens(out_BSD, self.token_group), other, routing

    def _pool(self, sums: dict[int, Routing]) -> dict[int, Routing]:
        """Sums up what the routers of all layers have counted, over the ranks that share the tokens."""
        if not self.shard_sequence or not sums:
            return sums
        parts = [value.view(-1) for routing in sums.values() for value in routing]
        totals = iter(reduce(torch.cat(parts), self.token_group).split([part.numel() for part in parts]))
        return {layer: Routing(*(next(totals).view(value.shape) for value in r)) for layer, r in sums.items()}


RowCounts = Callable[[int, Tensor, Tensor], tuple[list[int], list[int]]]


def row_counts(rows: int, sent_nE: Tensor, received_nE: Tensor) -> tuple[list[int], list[int]]:
    """Returns how many rows a rank sends to each rank, and how many it gets from each. The host waits for the device once.

    Args:
        rows: how many rows the rank has. Some of them may belong to no expert.
        sent_nE: how many rows it sends to each expert of each rank.
        received_nE: how many rows it gets from each rank for each of its own experts.
    """
    sent, received = torch.stack([sent_nE.sum(1), received_nE.sum(1)]).tolist()
    return sent, received


@not_compiled
def run_experts(
    group: Group,
    experts: ExpertMLPs,
    rows_RD: Tensor,
    ends_E: Tensor,
    complete: bool,
    meanwhile: Callable[[], Tensor | None],
    row_counts: RowCounts = row_counts,
) -> tuple[Tensor, Tensor | None]:
    """Sends rows, which are sorted by expert, to the ranks of their experts, through these, and back.

    Rows after the last end belong to no expert; they stay here, and their result is zero. It is not compiled, because the host
    must know how many rows each rank sends. A faster exchange of tokens takes its place with the same arguments.
    """
    counts_nE = torch.diff(ends_E, prepend=ends_E.new_zeros(1)).view(group.size(), -1)
    received_nE = all_to_all(counts_nE, group)  # [rank, this rank's experts]
    sent, received = row_counts(rows_RD.shape[0], counts_nE, received_nE)
    kept, there, back = sum(sent), Travel(sent, received, group), Travel(received, sent, group)
    travelling_RD = there.start(rows_RD[:kept])
    other = meanwhile()
    arrived_RD = there.arrive(travelling_RD)
    # They arrive sorted by rank and then by expert, and are sorted by expert.
    numbers_E = torch.arange(received_nE.shape[1], device=rows_RD.device).repeat(group.size())
    order_R = numbers_E.repeat_interleave(received_nE.flatten(), output_size=sum(received)).argsort(stable=True)
    inverse_R, ends = ops.inverse(order_R), received_nE.sum(0).cumsum(0).int()
    out_RD = experts(ops.take_rows(arrived_RD, order_R, inverse_R), ends, True)
    back_RD = back.arrive(back.start(ops.take_rows(out_RD, inverse_R, order_R)))
    if not complete and kept < rows_RD.shape[0]:
        back_RD = torch.cat([back_RD, back_RD.new_zeros(rows_RD.shape[0] - kept, back_RD.shape[1])])
    return back_RD, other
