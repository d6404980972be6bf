"""Expert parallel: the experts of a layer are divided among ranks, and tokens travel to them (https://arxiv.org/abs/2006.16668).

``n`` ranks of the expert axis have ``E / n`` experts each. Each of them has other tokens; a rank sends every row (a token with
one of its choices) to the rank of its expert, and gets it back.

    gate, up, down of experts  [E, out, in]   sharded along E over the expert axis
    router, shared expert, everything else    as without expert parallelism

Per layer with experts and micro-batch, over the expert group, with R rows on a rank and bytes of a row d:

| forward                                        | backward                |
|------------------------------------------------|-------------------------|
| 1 all-to-all of counts; 2 all-to-all of rows   | 2 all-to-all of rows    |

The router sees a rank's own tokens, as without expert parallelism, so losses, statistics and dropped tokens do not change. The
data axis shards the optimizer state of experts over the ranks that have the same ones.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from ..models.decoder import Decoder
from ..models.moe import ExpertLinear, ExpertMLPs, MoE
from ..ops.compiler import not_compiled
from .collectives import Group, all_to_all, exchange_rows
from .shards import local
from .strategy import Collectives, Workload


def traffic(work: Workload) -> list[Collectives]:
    """Returns the collectives over the expert group in a step. Without dropped tokens, each rank sends all its rows; how many
    it gets depends on the router, and is stated as the same number."""
    layout, experts = work.layout, work.decoder.experts
    if experts is None or layout.expert == 1:
        return []
    layers = [layer for layer in work.layers if work.decoder.is_sparse(layer)]
    forwards = len(layers) + len([layer for layer in layers if layer in work.recomputed_layers])
    rows = work.tokens * experts.top_k * work.decoder.hidden_size * work.element_bytes
    moved = 2 * (forwards + len(layers))
    exchanges = Collectives("all-to-all", "expert", moved + forwards, moved * rows + forwards * 4 * experts.count)
    return [exchanges.times(work.micro_batches)]


class ExpertParallel:
    """Divides the experts of a model among the ranks of a mesh, and sends tokens to them."""

    def __init__(self, mesh: DeviceMesh) -> None:
        """``mesh``: the ranks of the expert group, as a mesh of one dimension."""
        self.mesh, self.size, self.group = mesh, mesh.size(), mesh.get_group()

    def apply(self, model: Decoder) -> None:
        """Shards the experts and replaces ``run_experts``, in place. The model must be on the meta device."""
        for module in model.modules():
            if isinstance(module, ExpertLinear):
                sharded = distribute_tensor(module.weight.data, self.mesh, [Shard(0)], src_data_rank=None)
                module.register_parameter("weight", nn.Parameter(sharded))
                module.local_part = local
            elif isinstance(module, MoE):
                module.run_experts = partial(run_experts, self.group)


@not_compiled
def run_experts(group: Group, experts: ExpertMLPs, rows_RD: Tensor, ends_E: Tensor, complete: bool) -> Tensor:
    """Sends rows, which are sorted by expert, to the ranks of their experts, through these, and back.

    Rows after the last end belong to no expert; they stay here, and their result is zero. It is not compiled, because the host
    must know how many rows each rank sends.
    """
    counts_nE = torch.diff(ends_E, prepend=ends_E.new_zeros(1)).view(group.size(), -1)
    received_nE = all_to_all(counts_nE, group)  # [rank, this rank's experts]
    sent, received = counts_nE.sum(1).tolist(), received_nE.sum(1).tolist()
    kept = sum(sent)
    arrived_RD = exchange_rows(rows_RD[:kept], sent, received, group)
    # They arrive sorted by rank and then by expert, and are sorted by expert.
    numbers_E = torch.arange(received_nE.shape[1], device=rows_RD.device).repeat(group.size())
    order_R = numbers_E.repeat_interleave(received_nE.flatten()).argsort(stable=True)
    ends = received_nE.sum(0).cumsum(0).int()
    out_RD = experts(arrived_RD[order_R], ends, True)
    back_RD = exchange_rows(out_RD[order_R.argsort()], received, sent, group)
    if complete or kept == rows_RD.shape[0]:
        return back_RD
    return torch.cat([back_RD, back_RD.new_zeros(rows_RD.shape[0] - kept, back_RD.shape[1])])
