"""Megatron tensor parallel (mtp), Megatron sequence parallel (msp) and flash-attn sequence parallel (fsp).

``t`` ranks share each layer: attention by heads, the MLP by its columns, the embedding and the head by the vocabulary.

    q, k, v, gate, up  [out, in]   cut along out: each rank computes its heads, its columns
    o, down            [out, in]   cut along in:  each rank's result is a part of a sum
    embedding, head    [vocab, D]  cut along the vocabulary
    norms, biases of o and down    whole on every rank

Of fewer key/value heads than ranks, each rank holds the one that its query heads need.

Per layer and micro-batch, with A = one full activation (b * s * h * bytes):

| mode | forward                               | backward                              | kept at norms and residual |
|------|---------------------------------------|---------------------------------------|----------------------------|
| mtp  | 2 all-reduce of A                     | 2 all-reduce of A                     | A                          |
| msp  | 2 all-gather to A, 2 reduce-scatter   | 2 all-gather to A, 2 reduce-scatter   | A / t; inputs of linears A |
| fsp  | as msp                                | as msp, and 2 more all-gathers        | A / t                      |

In msp and fsp each rank has its tokens' part of the residual stream. fsp keeps a linear's input cut and gathers it again
for the weight's gradient, while the input's gradient is computed. Linears that share an input share its collective.

Sources: https://arxiv.org/abs/1909.08053 (mtp), https://arxiv.org/abs/2205.05198 (msp).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor

from .. import ops
from ..models.decoder import Decoder
from ..models.layers import Attention, GatedMLP
from ..models.linear import ADAPTER_INFIX, Adapter, Linear
from . import collectives
from .collectives import Group, all_gather, start_all_gather, start_reduce_scatter, tokens_first, wait
from .layout import Layout
from .shards import local
from .strategy import Collectives, Inner, Kept, Workload

OUT, IN = ("heads", "kv_heads", "mlp", "vocab"), ("heads", "mlp")
"""Axes along which a weight's rows, or its columns, are cut."""


def traffic(work: Workload) -> list[Collectives]:
    """Collectives over the tensor group of a step's forward and backward passes.

    A recomputed layer does its collectives again, but for the last one: nothing of the layer is needed after its last linear.
    """
    decoder, ranks, mode = work.decoder, work.layout.tensor, work.layout.mode
    layers, again = decoder.num_layers, work.recomputed_layers
    activation = work.tokens * decoder.hidden_size * work.element
    chunks = -(-work.tokens // ops.chunk_tokens(work.tokens, decoder.vocab_size // ranks, work.device))
    statistics = Collectives("all-gather", "tensor", chunks, 3 * 4 * work.tokens * ranks)
    # Out of attention, the MLP and the embedding; backward, where forward went into attention, the MLP and the head.
    leaves = 2 * layers + 1 + again
    if mode == "mtp":
        count = leaves + 2 * layers + 1
        rows = [Collectives("all-reduce", "tensor", count, count * activation), statistics]
    else:
        # Forward into attention, the MLP and the head; backward out of attention, the MLP and the embedding.
        enters = 2 * layers + 1 + work.recomputed_attentions + again
        gathers = enters + 2 * layers + 1 + (2 * layers if mode == "fsp" else 0)
        scatters = leaves + 2 * layers + 1
        rows = [
            Collectives("all-gather", "tensor", gathers, gathers * activation), statistics,
            Collectives("reduce-scatter", "tensor", scatters, scatters * activation),
        ]  # fmt: skip
    return [row.times(work.micro_batches) for row in rows]


def memory(work: Workload) -> Kept:
    """What a layer keeps, and where: see the table above."""
    tokens, layout = work.tokens, work.layout
    outside = tokens // layout.tensor if layout.cuts_sequence else tokens
    ranks, decoder = layout.tensor, work.decoder
    return Kept(
        outside=outside,
        inputs=tokens if layout.mode == "msp" else outside,
        attention=tokens,
        head_ranks=ranks,
        normed_heads=tokens * (decoder.num_heads // ranks + max(1, decoder.num_kv_heads // ranks)),
        columns=tokens // ranks,
        outputs=1,
        loss=tokens,
        head_rows=decoder.vocab_size // ranks,
    )


def shape_on_rank(shape: Sequence[int], axes: Sequence[str], name: str, layout: Layout) -> list[int]:
    """Shape of a rank's part of a parameter of a module with these axes."""
    mine, dim = list(shape), cut_along(axes, name)
    if dim is not None:
        mine[dim] //= layout.tensor // layout.kv_copies if "kv_heads" in axes else layout.tensor
    return mine


def partial_axis(axes: Sequence[str], name: str, layout: Layout) -> str | None:
    """The axis over which a parameter's gradients must still be summed after the last backward, if there is one."""
    if cut_along(axes, name) is not None:
        return "kv copies" if axes[0] == "kv_heads" and layout.kv_copies > 1 else None
    return "tensor" if layout.cuts_sequence or tuple(axes) == ("head",) else None


def cut_along(axes: Sequence[str], name: str) -> int | None:
    """The dimension along which a parameter of a module with these axes is cut; None: it is whole on every rank."""
    if axes and axes[0] in OUT:
        return 0
    return 1 if len(axes) > 1 and axes[1] in IN and name == "weight" else None


class TensorParallel:
    """Cuts a model (on the meta device) over a mesh of one dimension, and puts the collectives in."""

    def __init__(self, mesh: DeviceMesh, mode: str, kv_mesh: DeviceMesh | None = None) -> None:
        """
        Args:
            mesh: t ranks.
            mode: mtp, msp or fsp.
            kv_mesh: the same ranks as ("heads", "copies"), when there are fewer key/value heads than ranks.
        """
        self.mesh, self.mode, self.size, self.rank = mesh, mode, mesh.size(), mesh.get_local_rank()
        self.kv_mesh = kv_mesh
        self.group: Group = mesh.get_group()
        self.cut = mode != "mtp"
        """Whether ranks have their own tokens outside attention and MLP. Off for generation, token by token."""

    def apply(self, model: Decoder) -> Inner:
        """Cuts the weights and exchanges the layers' functions, in place."""
        partial_gradients: dict[str, Group] = {}
        for path, module in model.named_modules():
            axes = getattr(module, "axes", ())
            for name, parameter in list(module.named_parameters(recurse=False)):
                mesh, places = self._places(axes, name)
                if places:
                    cut = nn.Parameter(distribute_tensor(parameter.data, mesh, places, src_data_rank=None))
                    module.register_parameter(name, cut)
                if Replicate() in places:  # copies of a key/value head serve different query heads
                    partial_gradients[f"{path}.{name}"] = mesh.get_group("copies")
                elif not places and (self.cut or axes == ("head",) or ADAPTER_INFIX in f"{path}."):
                    partial_gradients[f"{path}.{name}"] = self.group
            if isinstance(module, Adapter):
                module.local_part = local
            elif isinstance(module, Attention):
                self._attention(module, model.config.num_heads, model.config.num_kv_heads)
            elif isinstance(module, GatedMLP):
                module.project, module.finish = self._project, self._finish
        model.tie()
        if model.embed is not None:
            model.embed.look_up = self._look_up
        if (head := model.head) is not None:
            head.whole_rows, head.logits, head.loss = local, self._logits, partial(self._loss, model.config.vocab_size)
        return Inner(partial_gradients, self)

    def _places(self, axes: Sequence[str], name: str) -> tuple[DeviceMesh, list[Placement]]:
        """Over which mesh a parameter is cut, and how; no placements: it is whole on every rank."""
        dim = cut_along(axes, name)
        if dim is not None and axes[0] == "kv_heads" and self.kv_mesh is not None:
            return self.kv_mesh, [Shard(dim), Replicate()]
        return self.mesh, [] if dim is None else [Shard(dim)]

    def _attention(self, module: Attention, heads: int, kv_heads: int) -> None:
        module.project, module.finish = self._project, self._finish
        module.kv_heads = max(1, kv_heads // self.size)
        share = heads // self.size
        module.own_heads = lambda values: values[self.rank * share : (self.rank + 1) * share]

    # What layers do instead ------------------------------------------------------------------------------------------

    def _enter(self, x_BSD: Tensor) -> Tensor:
        """Into a block of cut weights: all tokens, whose gradient is the sum of the ranks' parts."""
        return collectives.gather_tokens(x_BSD, self.group) if self.cut else collectives.copy(x_BSD, self.group)

    def _leave(self, x_BSD: Tensor) -> Tensor:
        """Out of it: the sum of the ranks' parts."""
        return collectives.scatter_tokens(x_BSD, self.group) if self.cut else collectives.reduce(x_BSD, self.group)

    def _project(self, x_BSD: Tensor, linears: Sequence[Linear]) -> list[Tensor]:
        weights = [local(linear.weight) for linear in linears]
        biases = [None if linear.bias is None else local(linear.bias) for linear in linears]
        adapted = any(linear.lora is not None for linear in linears)
        if self.mode == "fsp" and self.cut and not adapted:  # an adapter needs the gathered input for its own gradients
            outs = list(_GatheredInputLinears.apply(x_BSD, self.group, *weights))
            return [out if bias is None else out + bias for out, bias in zip(outs, biases, strict=True)]
        x_BSD = self._enter(x_BSD)
        return [
            linear.adapt(x_BSD, F.linear(x_BSD, weight, bias))
            for linear, weight, bias in zip(linears, weights, biases, strict=True)
        ]

    def _finish(self, x_BSF: Tensor, linear: Linear) -> Tensor:
        out_BSD = self._leave(linear.adapt(x_BSF, F.linear(x_BSF, local(linear.weight))))
        return out_BSD if linear.bias is None else out_BSD + linear.bias

    def _look_up(self, tokens_BS: Tensor, weight_VD: Tensor) -> Tensor:
        rows_VD = local(weight_VD)
        numbers = tokens_BS - self.rank * rows_VD.shape[0]
        here = (numbers >= 0) & (numbers < rows_VD.shape[0])
        x_BSD = F.embedding(numbers.clamp(0, rows_VD.shape[0] - 1), rows_VD)
        return self._leave(torch.where(here.unsqueeze(-1), x_BSD, 0.0))

    def _logits(self, x_BSD: Tensor, weight_VD: Tensor) -> Tensor:
        """[B, S, V], whole on every rank: for generation."""
        out_BSV = F.linear(self._enter(x_BSD), weight_VD)
        return all_gather(out_BSV.movedim(-1, 0), self.group).movedim(0, -1)

    def _loss(
        self, vocabulary: int, x_BSD: Tensor, weight_VD: Tensor, labels_BS: Tensor, smoothing: float
    ) -> tuple[Tensor, Tensor]:
        """The loss of all tokens on every rank; of each token's losses, every rank reports its share."""
        shard = ops.VocabShard(self.rank * weight_VD.shape[0], vocabulary, self._stack)
        x_TD = self._enter(x_BSD).flatten(0, 1)
        total, losses = ops.linear_cross_entropy(x_TD, weight_VD, labels_BS.flatten(), smoothing, shard)
        share = losses.numel() // self.size
        mine = torch.zeros_like(losses)
        last = losses.numel() if self.rank == self.size - 1 else (self.rank + 1) * share
        mine[self.rank * share : last] = losses[self.rank * share : last]
        return total, mine.view(labels_BS.shape)

    def _stack(self, x: Tensor) -> Tensor:
        return all_gather(x.unsqueeze(0), self.group)


class _GatheredInputLinears(torch.autograd.Function):
    """fsp: linears of one gathered input, of which only this rank's tokens are kept for backward."""

    @staticmethod
    def forward(ctx, x_BSD: Tensor, group: Group, *weights: Tensor):  # type: ignore[override, no-untyped-def]
        ctx.group = group
        ctx.save_for_backward(x_BSD, *weights)
        whole_SBD = all_gather(tokens_first(x_BSD), group)
        return tuple(F.linear(whole_SBD, weight).transpose(0, 1) for weight in weights)

    @staticmethod
    def backward(ctx, *grads: Tensor):  # type: ignore[override, no-untyped-def]
        x_BSD, *weights = ctx.saved_tensors
        # Started before the product that hides it.
        gathering = start_all_gather([tokens_first(x_BSD)], ctx.group)
        parts_SBF = [tokens_first(grad) for grad in grads]
        grad_SBD = parts_SBF[0] @ weights[0]
        for part, weight in zip(parts_SBF[1:], weights[1:], strict=True):
            grad_SBD += part @ weight
        scattering = start_reduce_scatter([grad_SBD], ctx.group)
        whole_TD = wait(gathering[0]).flatten(0, 1)
        grad_weights = [part.flatten(0, 1).t() @ whole_TD for part in parts_SBF]
        return wait(scattering[0]).transpose(0, 1), None, *grad_weights
