"""Intern Sequence Parallel (isp, https://arxiv.org/abs/2401.09149): whole weights come to cut sequences.

Two groups that need not be the same: ``t`` ranks share a sequence, ``w`` ranks share each weight.

    every linear, embedding, head  [out, in]   cut along out over w; gathered for use, in forward and again in backward
    norms, biases                              whole on every rank
    activations                                each rank has its S/t tokens, everywhere but inside attention
    attention                                  all tokens of H/t heads

Per layer and micro-batch, with W = the layer's weights and A = one full activation (b * s * h * bytes):

| group  | forward                                  | backward                                                   |
|--------|------------------------------------------|------------------------------------------------------------|
| weight | 4 all-gathers, together W                | 4 all-gathers, together W; 4 reduce-scatters, together W   |
| tensor | 2 all-to-all: q, k, v as one; the output | the same                                                   |

q, k and v are gathered as one, and gate and up (they share an input); o and down by themselves. With ``overlap`` the next
weights are gathered while these are used, in both directions, and gradients are reduce-scattered while the layer's backward
goes on.
A recomputed layer gathers twice, not three times: its backward uses what its second forward has gathered.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed._functional_collectives as functional
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from ..config.parallel import Weight
from ..models.decoder import Decoder
from ..models.layers import DecoderLayer, GatedMLP, look_up, loss
from ..models.linear import MARK, Linear
from . import collectives
from .collectives import Group, exchange
from .layout import Layout
from .shards import local
from .strategy import Collectives, Inner, Kept, Workload


def traffic(work: Workload) -> list[Collectives]:
    """Collectives over the tensor and weight groups of a step's forward and backward passes.

    The backward of what is recomputed uses the weights that its second forward has gathered.
    """
    rows, decoder, layout = [], work.decoder, work.layout
    layers, size, d = decoder.num_layers, decoder.head_dim, decoder.hidden_size
    layer = d * size * (2 * decoder.num_heads + 2 * decoder.num_kv_heads) + 3 * d * decoder.intermediate_size
    ends = 2 * decoder.vocab_size * d  # the embedding and the head are gathered once and scattered once
    rows.append(Collectives("all-gather", "weight", 8 * layers + 2, (2 * layers * layer + ends) * work.element))
    rows.append(Collectives("reduce-scatter", "weight", 4 * layers + 2, (layers * layer + ends) * work.element))
    kv_heads = decoder.num_kv_heads * max(1, layout.tensor // decoder.num_kv_heads)
    exchanged = work.tokens // layout.tensor * size * (2 * decoder.num_heads + 2 * kv_heads) * work.element
    passes = 2 * layers + work.recomputed_attentions
    rows.append(Collectives("all-to-all", "tensor", 2 * passes, passes * exchanged))
    return [row.times(work.micro_batches) for row in rows]


def memory(work: Workload) -> Kept:
    """What a layer keeps: this rank's tokens everywhere, but for attention; and no full weight."""
    tokens, ranks, decoder = work.tokens // work.layout.tensor, work.layout.tensor, work.decoder
    return Kept(
        outside=tokens,
        inputs=tokens,
        attention=work.tokens,
        head_ranks=ranks,
        normed_heads=tokens * (decoder.num_heads + decoder.num_kv_heads),
        columns=tokens,
        outputs=2 if ranks > 1 else 1,  # before and after the all-to-all
        loss=tokens,
        head_rows=decoder.vocab_size,
    )


def shape_on_rank(shape: Sequence[int], axes: Sequence[str], name: str, layout: Layout) -> list[int]:
    """Shape of a rank's part of a parameter."""
    return [shape[0] // layout.weight, *shape[1:]] if _is_cut(name, len(shape)) else list(shape)


def partial_axis(axes: Sequence[str], name: str, layout: Layout) -> str | None:
    """The axis over which a parameter's gradients must still be summed after the last backward: of norms and biases."""
    return None if axes and len(axes) > 1 and name == "weight" else "weight"


def _is_cut(name: str, dims: int) -> bool:
    """Every matrix is cut; norms and biases are whole."""
    return name == "weight" and dims == 2


class InternSequenceParallel:
    """Cuts a model's weights over one group and its sequences over another."""

    def __init__(self, weights: DeviceMesh, tokens: DeviceMesh, config: Weight) -> None:
        """``weights``, ``tokens``: meshes of one dimension, w and t ranks."""
        self.mesh, self.config = weights, config
        self.weight_group: Group = weights.get_group()
        self.token_group: Group = tokens.get_group()
        self.size, self.rank = tokens.size(), tokens.get_local_rank()
        self.cut = self.size > 1
        """Whether sequences are cut. Off for generation, token by token."""

    def apply(self, model: Decoder) -> Inner:
        """Cuts the weights and exchanges the layers' functions, in place."""
        whole: dict[str, Group] = {}
        for path, module in model.named_modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if _is_cut(name, parameter.dim()) and self.mesh.size() > 1 and MARK not in f"{path}.":
                    cut = nn.Parameter(distribute_tensor(parameter.data, self.mesh, [Shard(0)], src_data_rank=None))
                    module.register_parameter(name, cut)
                elif self.mesh.size() > 1:
                    whole[f"{path}.{name}"] = self.weight_group
        model.tie()
        stations = [station for number, layer in model.numbered_layers() for station in self._layer(number, layer)]
        connect(stations, self.config)
        if model.embed is not None:
            model.embed.look_up = self._look_up
        if model.head is not None:
            model.head.whole_rows, model.head.loss = self._whole, self._loss
        return Inner(whole, self)

    def _layer(self, number: int, layer: nn.Module) -> list[Station]:
        assert isinstance(layer, DecoderLayer) and isinstance(layer.mlp, GatedMLP)
        attn, mlp = layer.attn, layer.mlp
        groups = {"wqkv": [attn.q, attn.k, attn.v], "wo": [attn.o], "w1": [mlp.gate, mlp.up], "w2": [mlp.down]}
        stations = {name: Station(number, layer, linears, self.weight_group) for name, linears in groups.items()}
        attn.project, attn.finish = partial(_project, stations["wqkv"]), partial(_finish, stations["wo"])
        mlp.project, mlp.finish = partial(_project, stations["w1"]), partial(_finish, stations["w2"])
        attn.split_heads, attn.join_heads, attn.own_heads = self._split_heads, self._join_heads, self._own_heads
        found = list(stations.values())
        for station in found:
            station.first, station.layer_stations = found[0], found
        return found

    # What layers do instead ------------------------------------------------------------------------------------------

    def _tokens(self, x_BS: Tensor) -> Tensor:
        """This rank's tokens of every row."""
        return x_BS.chunk(self.size, dim=1)[self.rank] if self.cut else x_BS

    def _whole(self, weight: Tensor) -> Tensor:
        """A weight in full, for the embedding and the head; its gradient is reduce-scattered."""
        return collectives.gather(local(weight), self.weight_group) if isinstance(weight, DTensor) else weight

    def _look_up(self, tokens_BS: Tensor, weight_VD: Tensor) -> Tensor:
        return look_up(self._tokens(tokens_BS), self._whole(weight_VD))

    def _loss(self, x_BSD: Tensor, weight_VD: Tensor, labels_BS: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
        """The loss of this rank's tokens; the losses of the others are 0."""
        total, mine = loss(x_BSD, weight_VD, self._tokens(labels_BS).contiguous(), smoothing)
        losses = torch.zeros(labels_BS.shape, dtype=mine.dtype, device=mine.device)
        self._tokens(losses).copy_(mine)
        return total, losses

    def _split_heads(self, q_BSHN: Tensor, k_BSKN: Tensor, v_BSKN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, S/t, H, N] and [B, S/t, K, N] -> all tokens of this rank's heads, q, k and v in one all-to-all. Where there are
        fewer key/value heads than ranks, each goes to all that need it."""
        if not self.cut:
            return q_BSHN, k_BSKN, v_BSKN
        repeats = max(1, self.size // k_BSKN.shape[2])
        k_BSKN, v_BSKN = (x.repeat_interleave(repeats, dim=2) if repeats > 1 else x for x in (k_BSKN, v_BSKN))
        parts = [x.unflatten(2, (self.size, -1)) for x in (q_BSHN, k_BSKN, v_BSKN)]
        sent = torch.cat(parts, dim=3).movedim(2, 0)
        received = exchange(sent, self.token_group).movedim(0, 1).flatten(1, 2)
        q, k, v = received.split([part.shape[3] for part in parts], dim=2)
        return q, k, v.contiguous()  # kept for backward, and not all three with it

    def _join_heads(self, out_BSHN: Tensor) -> Tensor:
        """[B, S, H/t, N] -> [B, S/t, H, N]."""
        if not self.cut:
            return out_BSHN
        sent = out_BSHN.unflatten(1, (self.size, -1)).movedim(1, 0)
        return exchange(sent, self.token_group).movedim(0, 2).flatten(2, 3)

    def _own_heads(self, values: list[float]) -> list[float]:
        share = len(values) // self.size
        return values[self.rank * share : (self.rank + 1) * share] if self.cut else values


# The weights of a layer, in stations ---------------------------------------------------------------------------------


class Station:
    """Linears whose weights are gathered at once. Stations stand in the order of the forward pass."""

    def __init__(self, layer: int, module: nn.Module, linears: Sequence[nn.Linear], group: Group) -> None:
        """``layer``, ``module``: the number of the layer, and the layer itself."""
        self.layer, self.module, self.linears, self.group = layer, module, linears, group
        self.after: list[Station] = []
        """Stations whose weights are fetched while these are used, forward."""
        self.before: list[Station] = []
        """The same, backward."""
        self.overlap = False
        """Whether weights are fetched ahead, and gradients waited for at their arrival."""
        self.first: Station = self
        """Of the layer's stations."""
        self.layer_stations: list[Station] = [self]
        self._coming: list[Tensor] | None = None
        self._kept: list[Tensor] | None = None
        self._backward_is_due = False
        self._parts: list[Tensor] | None = None
        self.sent: list[Tensor] = []
        """Gradients of the full weights that are on their way: a collective reads them, and does not hold them."""

    def parts(self) -> list[Tensor]:
        """This rank's parts of the weights, whose gradients may still be on their way when they come here.

        Autograd runs what was made last first. All of a layer's arrivals are made with its first station, so they wait for
        their gradients when the rest of the layer's backward is over (``_StationLinears.backward`` does not wait).
        """
        if not self.overlap:
            return [local(linear.weight) for linear in self.linears]
        if self is self.first:
            for station in self.layer_stations:
                station._parts = list(_Arrive.apply(station, *(local(linear.weight) for linear in station.linears)))
        parts, self._parts = self._parts, None
        assert parts is not None
        return parts

    def receive(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """This rank's parts of the gradients, when they are there."""
        arrived = [functional.wait_tensor(grad) for grad in grads]
        self.sent = []
        return arrived

    def fetch(self) -> None:
        """Starts to gather, unless that is under way."""
        if self._coming is None and self._kept is None:
            if isinstance(self.module, FSDPModule):
                self.module.unshard()  # the data axis gives a layer its part of the weights: now, not when the layer is called
            self._coming = gather([local(linear.weight.detach()) for linear in self.linears], self.group)

    def take(self, parts: Sequence[Tensor], then: list[Station]) -> list[Tensor]:
        """The weights in full; ``then`` are started on the way."""
        if not self.overlap:
            return [functional.wait_tensor(w) for w in gather(parts, self.group)]
        coming, self._coming = self._coming, None
        coming = coming if coming is not None else gather(parts, self.group)
        for station in then:
            station.fetch()
        return [functional.wait_tensor(w) for w in coming]

    def forward(self, parts: Sequence[Tensor], backward_comes: bool) -> list[Tensor]:
        """For the forward pass. In a recomputation the layer's own backward is next: it gets the same weights."""
        if torch._C._current_graph_task_id() == -1:
            self._backward_is_due = backward_comes
            return self.take(parts, self.after)
        # What had its backward would fetch weights that nobody waits for.
        layer = [station for station in self.after if station.layer == self.layer and station._backward_is_due]
        full = self.take(parts, layer)
        self._kept = full if backward_comes else None
        return full

    def backward(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """For the backward pass."""
        kept, self._kept, self._backward_is_due = self._kept, None, False
        return kept if kept is not None else self.take(parts, [station for station in self.before if station._backward_is_due])


def connect(stations: list[Station], config: Weight) -> None:
    """Who is fetched when: the next station ("module"), or the next layer's from one place of this layer on ("layer")."""
    per_layer, places = 4, {"wqkv": 0, "attn": 1, "wo": 1, "w1": 2}
    for number, station in enumerate(stations):
        station.overlap = config.overlap
        place, by_module = number % per_layer, config.forward_overlap_per == "module"
        if by_module or (station.layer == 0 and place < per_layer - 1):  # nothing has fetched the first layer's
            station.after = stations[number + 1 : number + 2]
        if not by_module and place == places[config.launch_allgather_before]:
            following = (station.layer + 1) * per_layer
            station.after = [*station.after, *stations[following : following + per_layer]]
        station.before = stations[number - 1 : number] if number else []


def gather(parts: Sequence[Tensor], group: Group) -> list[Tensor]:
    """[N, ...] of each rank -> [w * N, ...], several tensors in one call; not waited for."""
    parts = [collectives.sent(part) for part in parts]
    if len(parts) == 1:
        return [_plain(functional.all_gather_single(parts[0], 0, group))]
    return [_plain(w) for w in functional.all_gather_single_coalesced(parts, group)]


def scatter(grads: Sequence[Tensor], group: Group) -> list[Tensor]:
    """The inverse: the sums' parts, in one call; not waited for."""
    if len(grads) == 1:
        return [_plain(functional.reduce_scatter_single(grads[0], "sum", 0, group))]
    return [_plain(part) for part in functional.reduce_scatter_single_coalesced(list(grads), "sum", [0] * len(grads), group)]


def _plain(tensor: Any) -> Tensor:
    """Without the wrapper that waits at first use: it is waited for explicitly."""
    return tensor.elem if isinstance(tensor, functional.AsyncCollectiveTensor) else tensor


class _Arrive(torch.autograd.Function):
    """A station's parts of its weights as they are; backward waits for their gradients."""

    @staticmethod
    def forward(ctx, station: Station, *parts: Tensor):  # type: ignore[override, no-untyped-def]
        ctx.station = station
        return tuple(part.view_as(part) for part in parts)

    @staticmethod
    def backward(ctx, *grads: Tensor):  # type: ignore[override, no-untyped-def]
        return None, *ctx.station.receive(grads)


class _StationLinears(torch.autograd.Function):
    """Linears of one input; only the input and this rank's parts of the weights are kept for backward."""

    @staticmethod
    def forward(ctx, station: Station, x_BSD: Tensor, *parts: Tensor):  # type: ignore[override, no-untyped-def]
        ctx.station = station
        ctx.save_for_backward(x_BSD, *parts)
        # Where nothing is trained in front (adapters beside frozen weights), no gradient comes to the first layer's input.
        return tuple(F.linear(x_BSD, weight) for weight in station.forward(parts, any(ctx.needs_input_grad)))

    @staticmethod
    def backward(ctx, *grads: Tensor):  # type: ignore[override, no-untyped-def]
        x_BSD, *parts = ctx.saved_tensors
        full = ctx.station.backward(parts)
        rows_TD = x_BSD.flatten(0, 1)
        flat_TF = [grad.flatten(0, 1) for grad in grads]
        # Weights first: their gradients travel while the rest is computed.
        trained = any(ctx.needs_input_grad[2:])
        full_grads = [grad.t() @ rows_TD for grad in flat_TF] if trained else []
        scattered: list[Tensor] = scatter(full_grads, ctx.station.group) if trained else []
        grad_TD = flat_TF[0] @ full[0]
        for grad, weight in zip(flat_TF[1:], full[1:], strict=True):
            grad_TD += grad @ weight
        if ctx.station.overlap:
            ctx.station.sent = full_grads
        else:
            scattered = [functional.wait_tensor(part) for part in scattered]
        return None, grad_TD.view(x_BSD.shape), *(scattered if trained else [None] * len(parts))


def _project(station: Station, x_BSD: Tensor, linears: Sequence[Linear]) -> list[Tensor]:
    if not isinstance(linears[0].weight, DTensor):
        return [linear(x_BSD) for linear in linears]
    outs = _apply(station, x_BSD)
    return [
        linear.adapt(x_BSD, out if linear.bias is None else out + linear.bias)
        for out, linear in zip(outs, linears, strict=True)
    ]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _apply(station: Station, x_BSD: Tensor) -> tuple[Tensor, ...]:
    """Not compiled: a compiler would put the waits next to the gathers. What lies between the linears is."""
    return _StationLinears.apply(station, x_BSD, *station.parts())


def _finish(station: Station, x_BSF: Tensor, linear: Linear) -> Tensor:
    return _project(station, x_BSF, [linear])[0]
