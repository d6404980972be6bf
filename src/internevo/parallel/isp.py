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

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from ..config.parallel import Weight
from ..models.decoder import Decoder
from ..models.layers import DecoderLayer, GatedMLP, look_up, loss
from ..models.linear import ADAPTER_INFIX, Linear
from . import collectives, gathered
from .collectives import Group, exchange
from .gathered import GatheredWeights, connect
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
                if _is_cut(name, parameter.dim()) and self.mesh.size() > 1 and ADAPTER_INFIX not in f"{path}.":
                    cut = nn.Parameter(distribute_tensor(parameter.data, self.mesh, [Shard(0)], src_data_rank=None))
                    module.register_parameter(name, cut)
                elif self.mesh.size() > 1:
                    whole[f"{path}.{name}"] = self.weight_group
        model.tie()
        connect([weights for _, layer in model.numbered_layers() for weights in self._layer(layer)], self.config)
        if model.embed is not None:
            model.embed.look_up = self._look_up
        if model.head is not None:
            model.head.whole_rows, model.head.loss = self._whole, self._loss
        return Inner(whole, self)

    def _layer(self, layer: DecoderLayer) -> list[GatheredWeights]:
        """Exchanges a layer's functions. Returns its groups of weights, in the order of ``PER_LAYER``."""
        attn, mlp = layer.attn, layer.mlp
        assert isinstance(mlp, GatedMLP)
        groups = [
            GatheredWeights(layer, linears, self.weight_group)
            for linears in ([attn.q, attn.k, attn.v], [attn.o], [mlp.gate, mlp.up], [mlp.down])
        ]
        for weights in groups:
            weights.of_layer = groups
        wqkv, wo, w1, w2 = groups
        attn.project, attn.finish = partial(_project, wqkv), partial(_finish, wo)
        mlp.project, mlp.finish = partial(_project, w1), partial(_finish, w2)
        attn.split_heads, attn.join_heads, attn.own_heads = self._split_heads, self._join_heads, self._own_heads
        return groups

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


def _project(weights: GatheredWeights, x_BSD: Tensor, linears: Sequence[Linear]) -> list[Tensor]:
    """In place of ``models.layers.project``."""
    if not isinstance(linears[0].weight, DTensor):
        return [linear(x_BSD) for linear in linears]
    outs = gathered.linears(weights, x_BSD)
    return [
        linear.adapt(x_BSD, out if linear.bias is None else out + linear.bias)
        for out, linear in zip(outs, linears, strict=True)
    ]


def _finish(weights: GatheredWeights, x_BSF: Tensor, linear: Linear) -> Tensor:
    """In place of ``models.layers.finish``."""
    return _project(weights, x_BSF, [linear])[0]
