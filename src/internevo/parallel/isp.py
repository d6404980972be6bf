"""Intern Sequence Parallel (isp, https://arxiv.org/abs/2401.09149): sequences are sharded, and full weights are gathered.

There are two kinds of groups, which may differ: ``t`` ranks share a sequence, and ``w`` ranks share each weight.

    every linear, embedding, head  [out, in]   sharded along out over w; gathered in the forward pass and in the backward pass
    norms, biases, router                      replicated
    activations                                each rank has S/t tokens, except in attention
    attention                                  each rank has all tokens of H/t heads

Per layer and micro-batch, with W = bytes of the layer's weights:

| group  | forward                                  | backward                                                   |
|--------|------------------------------------------|------------------------------------------------------------|
| weight | 4 all-gathers, W in total                | 4 all-gathers, W in total; 4 reduce-scatters, W in total   |
| tensor | 2 all-to-all: q, k and v; the output     | 2 all-to-all                                               |

With 2D sequence parallelism (``context``), these all-to-all are over fewer ranks, and keys and values are gathered over others.

The weights of q, k and v are gathered together, and so are those of gate and up, because they share an input. With ``overlap``,
the next weights are prefetched while these are used, in the forward and in the backward pass, and gradients are
reduce-scattered while the layer's backward pass continues. Latent attention (``models.layers.LatentAttention``) has two more
gathers: the linears of the latents, q, kv, o. A recomputed layer gathers its weights twice, not three times: its
backward pass uses the weights that the recomputation gathered.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from .. import ops
from ..config.parallel import Weight
from ..models.config import DecoderConfig
from ..models.decoder import Decoder
from ..models.layers import DecoderLayer, GatedMLP, LatentAttention, look_up, loss
from ..models.linear import ADAPTER_INFIX, Linear
from ..models.moe import ExpertLinear, MoE
from . import collectives, gathered
from .collectives import Group, exchange
from .context import ContextParallel, TokenOrder
from .deferred import Deferred
from .gathered import GatheredWeights, set_prefetch_order
from .layout import Layout, Meshes
from .shards import local
from .strategy import AppliedStrategy, Collectives, KeptActivations, Workload


def traffic(work: Workload) -> list[Collectives]:
    """Returns the collectives over the weight and tensor groups (or head and context groups) in the passes of a step."""
    rows, decoder, layout = [], work.decoder, work.layout
    layers, d = len(work.layers), decoder.hidden_size
    shared = decoder.experts.shared_size if decoder.experts is not None else 0
    widths = [shared if decoder.is_sparse(layer) else decoder.intermediate_size for layer in work.layers]
    attentions = layers * sum(linear.outputs * linear.inputs for linear in decoder.projections().values())
    weights = attentions + 3 * d * sum(widths)
    gathers = layers * attention_gathers(decoder) + 2 * len([width for width in widths if width])
    count = work.embeddings + work.heads  # one all-gather and one reduce-scatter of each
    ends = count * decoder.vocab_size * d
    rows.append(Collectives("all-gather", "weight", 2 * gathers + count, (2 * weights + ends) * work.element_bytes))
    rows.append(Collectives("reduce-scatter", "weight", gathers + count, (weights + ends) * work.element_bytes))
    kv_heads = decoder.num_kv_heads * max(1, layout.head // decoder.num_kv_heads)
    elements = decoder.head_dim * (decoder.num_heads + 2 * kv_heads) + decoder.value_dim * decoder.num_heads
    exchanged = work.tokens // layout.tensor * elements * work.element_bytes
    again = work.recomputed_attentions
    passes = 2 * layers + again
    rows.append(Collectives("all-to-all", "head" if layout.context > 1 else "tensor", 2 * passes, passes * exchanged))
    if layout.context > 1:
        keys = 2 * work.tokens * kv_heads // layout.head * decoder.head_dim * work.element_bytes
        rows.append(Collectives("all-gather", "context", layers + again, (layers + again) * keys))
        rows.append(Collectives("reduce-scatter", "context", layers, layers * keys))
    return [row.times(work.micro_batches) for row in rows]


def attention_gathers(decoder: DecoderConfig) -> int:
    """Returns how many gathers the weights of attention need."""
    return 2 if decoder.latent is None else 4


def memory(work: Workload) -> KeptActivations:
    """Returns what a layer keeps for the backward pass: this rank's tokens, except in attention. Full weights are not kept."""
    layout, decoder = work.layout, work.decoder
    tokens = work.tokens // layout.tensor
    return KeptActivations(
        residual_tokens=tokens,
        input_tokens=tokens,
        attention_tokens=work.tokens // layout.context,
        key_tokens=work.tokens,
        head_ranks=layout.head,
        normed_heads=tokens * (decoder.num_heads + decoder.num_kv_heads),
        mlp_tokens=tokens,
        attention_outputs=2 if layout.tensor > 1 else 1,  # of the kernel, and of all heads of this rank's tokens
        loss_tokens=tokens,
        output_tokens=tokens,
        head_rows=decoder.vocab_size,
        looked_up=8 * tokens * (layout.context > 1 and layout.head % 2),  # ids of tokens in two places of a row
    )


def shape_on_rank(shape: Sequence[int], axes: Sequence[str], name: str, layout: Layout) -> tuple[int, ...]:
    """Returns the shape of a rank's shard of a parameter."""
    return (shape[0] // layout.weight, *shape[1:]) if _is_sharded(axes, name) else tuple(shape)


def partial_axis(axes: Sequence[str], name: str, layout: Layout) -> str | None:
    """Returns the axis over which a parameter's gradients are summed after the last backward pass of a step.

    For parameters that are replicated it is "weight"; for the others None, because their gradients are reduce-scattered.
    """
    return None if _is_sharded(axes, name) else "weight"


def _is_sharded(axes: Sequence[str], name: str) -> bool:
    """Whether a parameter of a module with these axes is sharded: matrices are; norms, biases, the router and the gate of the
    shared expert are replicated."""
    return name == "weight" and len(axes) == 2 and axes[0] not in ("expert", "one")


class InternSequenceParallel:
    """Shards the weights of a model over one group, and its sequences over another."""

    def __init__(self, layout: Layout, meshes: Meshes, config: Weight, deferred: Deferred | None = None) -> None:
        """
        Args:
            config: ``parallel.weight``.
            deferred: where the gradients of weights are left, if the schedule computes them later.
        """
        self.mesh, self.config, self.deferred = meshes.weights["inner"], config, deferred
        self.weight_group: Group = self.mesh.get_group()
        self.head_group: Group = meshes.head.get_group()
        self.order = TokenOrder.of(layout, meshes.tensor.get_local_rank())
        self.heads, self.head_rank = self.order.heads, self.order.head
        self.context = ContextParallel(self.order, meshes.context.get_group()) if meshes.context is not None else None
        self.shard_sequence = layout.tensor > 1
        """Whether sequences are sharded. It is turned off for generation, which computes one token at a time."""

    def apply(self, model: Decoder) -> AppliedStrategy:
        """Shards the weights and replaces the layers' functions, in place. The model must be on the meta device."""
        partial_gradients: dict[str, Group] = {}
        for path, module in model.named_modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if isinstance(module, ExpertLinear):
                    continue
                axes = getattr(module, "axes", ())
                if _is_sharded(axes, name) and self.mesh.size() > 1 and ADAPTER_INFIX not in f"{path}.":
                    sharded = nn.Parameter(distribute_tensor(parameter.data, self.mesh, [Shard(0)], src_data_rank=None))
                    module.register_parameter(name, sharded)
                elif self.mesh.size() > 1:
                    partial_gradients[f"{path}.{name}"] = self.weight_group
        model.tie()
        if self.context is not None:
            model.queries = self._queries
        layers = [self._apply_to_layer(layer) for _, layer in model.numbered_layers()]
        set_prefetch_order(layers, self.config, attention_gathers(model.config))
        if model.embed is not None:
            model.embed.look_up = self._look_up
        if model.head is not None:
            model.head.whole_rows, model.head.loss = self._gather_weight, self._loss
        return AppliedStrategy(partial_gradients, (self,))

    def _apply_to_layer(self, layer: DecoderLayer) -> list[GatheredWeights]:
        """Replaces a layer's functions. Returns its weights, in the order of the forward pass."""
        attn, of_layer = layer.attn, list[GatheredWeights]()

        def gathered_together(*linears: Linear) -> GatheredWeights:
            of_layer.append(GatheredWeights(layer, linears, self.weight_group, self.deferred))
            return of_layer[-1]

        if isinstance(attn, LatentAttention):
            first = (attn.kv_a,) if attn.q_a is None else (attn.q_a, attn.kv_a)
            attn.project = partial(_project, gathered_together(*first))
            attn.project_q = partial(_project, gathered_together(attn.q))
            attn.project_kv = partial(_project, gathered_together(attn.kv))
            attn.split_heads = partial(self._split_heads, rotated=True)
        else:
            attn.project = partial(_project, gathered_together(attn.q, attn.k, attn.v))
            attn.split_heads = partial(self._split_heads, rotated=attn.rotates)
            attn.own_heads = self._local_heads
        attn.finish = partial(_finish, gathered_together(attn.o))
        attn.join_heads = self._join_heads
        if self.context is not None:
            attn.attend = partial(self._attend, self.context)
        mlp = layer.mlp.shared if isinstance(layer.mlp, MoE) else layer.mlp
        if isinstance(mlp, GatedMLP):
            mlp.project = partial(_project, gathered_together(mlp.gate, mlp.up))
            mlp.finish = partial(_finish, gathered_together(mlp.down))
        for weights in of_layer:
            weights.of_layer = of_layer
        return of_layer

    # The functions that replace those of the layers -------------------------------------------------------------------

    def _local_tokens(self, x_BS: Tensor) -> Tensor:
        """Returns this rank's tokens of every row."""
        return self.order.own(x_BS) if self.shard_sequence else x_BS

    def _queries(self, x_BS: Tensor) -> Tensor:
        """Returns the tokens of every row whose queries this rank has in attention."""
        return self.order.queries(x_BS) if self.shard_sequence else x_BS

    def _attend(
        self, context: ContextParallel, q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None, longest: int, **options: Any
    ) -> Tensor:
        """Replaces ``ops.attention``."""
        return (context.attention if self.shard_sequence else ops.attention)(q, k, v, documents, longest, **options)

    def _gather_weight(self, weight: Tensor) -> Tensor:
        """Gathers the full weight of the embedding or the head. Its gradient is reduce-scattered."""
        return collectives.gather(local(weight), self.weight_group) if isinstance(weight, DTensor) else weight

    def _look_up(self, tokens_BS: Tensor, weight_VD: Tensor) -> Tensor:
        return look_up(self._local_tokens(tokens_BS), self._gather_weight(weight_VD))

    def _loss(
        self, x_BSD: Tensor, weight_VD: Tensor, labels_BS: Tensor, smoothing: float, softcap: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Computes the losses of this rank's tokens; those of the other tokens are 0."""
        total, mine = loss(x_BSD, weight_VD, self._local_tokens(labels_BS).contiguous(), smoothing, softcap)
        return total, self.order.placed(mine, labels_BS.shape[1]) if self.shard_sequence else mine

    def _split_heads(self, q_BSHN: Tensor, k_BSKN: Tensor, v_BSKN: Tensor, rotated: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Exchanges q, k and v in one all-to-all: all heads of this rank's tokens -> all tokens of this rank's heads.

        Shapes: q [B, S/t, H, N] -> [B, S, H/t, N]; k and v the same with K heads. If there are fewer key/value heads than
        ranks, each is sent to all ranks that need it. (With c context ranks: [B, S/c, H*c/t, N].)

        Args:
            rotated: whether the backward pass needs none of this q and k, since a rotary embedding makes others of them.
        """
        if not self.shard_sequence or self.heads == 1:
            return q_BSHN, k_BSKN, v_BSKN
        repeats = max(1, self.heads // k_BSKN.shape[2])
        k_BSKN, v_BSKN = (x.repeat_interleave(repeats, dim=2) if repeats > 1 else x for x in (k_BSKN, v_BSKN))
        parts = [x.unflatten(2, (self.heads, -1)) for x in (q_BSHN, k_BSKN, v_BSKN)]
        by_rank = torch.cat(parts, dim=3).movedim(2, 0)
        qkv = exchange(by_rank, self.head_group).movedim(0, 1).flatten(1, 2)
        q, k, v = qkv.split([part.shape[3] for part in parts], dim=2)
        # What the backward pass needs must be no view, which would keep the memory of all three. (Others are gathered.)
        if self.context is not None:
            return q if rotated else q.contiguous(), k, v
        return q, k, v.contiguous() if rotated else v

    def _join_heads(self, out_BSHN: Tensor) -> Tensor:
        """Exchanges the output of attention in one all-to-all: [B, S, H/t, N] -> [B, S/t, H, N]."""
        if not self.shard_sequence or self.heads == 1:
            return out_BSHN
        by_rank = out_BSHN.unflatten(1, (self.heads, -1)).movedim(1, 0)
        return exchange(by_rank, self.head_group).movedim(0, 2).flatten(2, 3)

    def _local_heads(self, values: Tensor) -> Tensor:
        share = len(values) // self.heads
        return values[self.head_rank * share : (self.head_rank + 1) * share] if self.shard_sequence else values


def _project(weights: GatheredWeights, x_BSD: Tensor, linears: Sequence[Linear]) -> list[Tensor]:
    """Replaces ``models.layers.project``."""
    if not isinstance(linears[0].weight, DTensor):
        return [linear(x_BSD) for linear in linears]
    outs = gathered.linears(weights, x_BSD)
    return [
        linear.adapt(x_BSD, out if linear.bias is None else out + linear.bias)
        for out, linear in zip(outs, linears, strict=True)
    ]


def _finish(weights: GatheredWeights, x_BSF: Tensor, linear: Linear) -> Tensor:
    """Replaces ``models.layers.finish``."""
    return _project(weights, x_BSF, [linear])[0]
