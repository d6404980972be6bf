"""Megatron tensor parallel (mtp), Megatron sequence parallel (msp) and flash-attn sequence parallel (fsp).

``t`` ranks share each layer: the heads of attention, the columns of the MLP, and the vocabulary of the embedding and the head.

    q, k, v, gate, up  [out, in]   sharded along out: each rank computes its own heads or columns
    o, down            [out, in]   sharded along in: each rank computes a partial sum
    embedding, head    [vocab, D]  sharded along the vocabulary
    norms, biases of o and down    replicated

If there are fewer key/value heads than ranks, each rank has the one head that its query heads need.

Latent attention (``models.layers.LatentAttention``): q and kv are sharded along out, and the linears and norms of the latents
are replicated. A rank computes the latents of its tokens. They are gathered in one collective, and their gradients are reduced;
their bytes take the place of A at the input of attention. fsp keeps them as msp does.

Per layer and micro-batch, with A = bytes of one full activation (tokens of a micro-batch * hidden size * bytes per element):

| mode | forward                             | backward                            | kept at the norms | kept linear inputs |
|------|-------------------------------------|-------------------------------------|-------------------|--------------------|
| mtp  | 2 all-reduce of A                   | 2 all-reduce of A                   | A                 | A                  |
| msp  | 2 all-gather to A, 2 reduce-scatter | 2 all-gather to A, 2 reduce-scatter | A / t             | A                  |
| fsp  | as msp                              | as msp, and 2 more all-gathers      | A / t             | A / t              |

In msp and fsp, each rank has the residual stream of S / t tokens. fsp keeps only this rank's tokens of a linear's input. It
gathers the input again for the weight's gradient, while the input's gradient is computed. Linears that share an input share its
collectives.

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
from ..models.layers import Attention, GatedMLP, LatentAttention, scale_gradient
from ..models.linear import ADAPTER_INFIX, Adapter, Linear
from ..models.moe import ExpertLinear, MoE, Routing
from ..ops.compiler import not_compiled
from . import collectives
from .collectives import Group, all_gather, start_all_gather, start_reduce_scatter, tokens_first, wait
from .deferred import Deferred, product
from .layout import Layout
from .shards import local
from .strategy import AppliedStrategy, Collectives, KeptActivations, Workload

ROW_AXES, COLUMN_AXES = ("heads", "kv_heads", "mlp", "vocab"), ("heads", "mlp")
"""Names of the axes of weights: if a weight's rows, or its columns, are along one of these axes, they are sharded."""


def traffic(work: Workload) -> list[Collectives]:
    """Returns the collectives over the tensor group in the forward and backward passes of a step.

    A recomputed layer repeats its collectives except the last one: recomputation ends when it has the input of the last linear.
    A layer with experts is as one with an MLP, except that fsp does not gather its input again. If the experts are not sharded
    over the tensor axis, only the shared one is an MLP, whose output is needed again.
    """
    decoder, ranks, mode = work.decoder, work.layout.tensor, work.layout.mode
    sparse = [layer for layer in work.layers if decoder.is_sparse(layer)]
    whole = [] if work.layout.experts_by_tensor else sparse
    shared = whole if decoder.experts is not None and decoder.experts.shared_size else []
    mlps = [layer for layer in work.layers if layer not in whole or layer in shared]
    again_in_fsp = [layer for layer in mlps if layer not in sparse or layer in shared]
    blocks, recomputed = len(work.layers) + len(mlps), work.recomputed_layers  # blocks: attentions and MLPs
    inputs_again = work.recomputed_attentions + len([layer for layer in recomputed if layer in mlps])
    outputs_again = len(recomputed) + len([layer for layer in recomputed if layer in shared])
    activation = work.tokens * decoder.hidden_size * work.element_bytes
    more = work.tokens * decoder.attention_inputs * work.element_bytes - activation  # at the input of attention
    dense_inputs = 0 if decoder.latent else len(work.layers)
    chunks = -(-work.tokens // ops.chunk_tokens(work.tokens, decoder.vocab_size // ranks, work.device))
    statistics = Collectives("all-gather", "tensor", chunks, 3 * 4 * work.tokens * ranks).times(work.heads)
    # Forward: outputs of the blocks and the embedding. (Backward: inputs of the blocks and the head.)
    outputs = blocks + work.embeddings + outputs_again
    if mode == "mtp":
        count = outputs + blocks + work.heads
        rows = [Collectives("all-reduce", "tensor", count, count * activation + len(work.layers) * more), statistics]
    else:
        # Forward: inputs of the blocks and the head. (Backward: outputs of the blocks and the embedding.)
        inputs = blocks + work.heads + inputs_again
        gathers = inputs + blocks + work.embeddings + (dense_inputs + len(again_in_fsp) if mode == "fsp" else 0)
        scatters = outputs + blocks + work.heads
        rows = [
            Collectives(
                "all-gather", "tensor", gathers, gathers * activation + (len(work.layers) + work.recomputed_attentions) * more
            ),
            statistics,
            Collectives("reduce-scatter", "tensor", scatters, scatters * activation + len(work.layers) * more),
        ]  # fmt: skip
    return [row.times(work.micro_batches) for row in rows]


def memory(work: Workload) -> KeptActivations:
    """Returns what a layer keeps for the backward pass; see the table above."""
    tokens, layout = work.tokens, work.layout
    residual_tokens = tokens // layout.tensor if layout.shards_sequence else tokens
    ranks, decoder = layout.tensor, work.decoder
    return KeptActivations(
        residual_tokens=residual_tokens,
        input_tokens=tokens if layout.mode == "msp" else residual_tokens,
        attention_tokens=tokens,
        key_tokens=tokens,
        head_ranks=ranks,
        normed_heads=tokens * (decoder.num_heads // ranks + max(1, decoder.num_kv_heads // ranks)),
        mlp_tokens=tokens // ranks,
        attention_outputs=1,
        loss_tokens=tokens,
        output_tokens=tokens,
        head_rows=decoder.vocab_size // ranks,
        looked_up=(8 + 1) * tokens if ranks > 1 else 0,  # the row of each token, and whether it is on this rank
        shared_latents=tokens if ranks > 1 else 0,
    )


def shape_on_rank(shape: Sequence[int], axes: Sequence[str], name: str, layout: Layout) -> tuple[int, ...]:
    """Returns the shape of a rank's shard of a parameter of a module with these axes."""
    local_shape, dim = list(shape), sharded_dim(axes, name)
    if dim is not None:
        local_shape[dim] //= layout.tensor // layout.kv_replicas if "kv_heads" in axes else layout.tensor
    return tuple(local_shape)


def partial_axis(axes: Sequence[str], name: str, layout: Layout) -> str | None:
    """Returns the axis over which a parameter's gradients are summed after the last backward pass of a step, or None."""
    if sharded_dim(axes, name) is not None:
        replicated = axes[0] == "kv_heads" and layout.kv_replicas > 1
        # One key/value head is on all ranks: the same group, which sums all gradients at once.
        return ("kv replicas" if layout.kv_replicas < layout.tensor else "tensor") if replicated else None
    return "tensor" if is_partial(axes, layout.shards_sequence, layout.experts_by_tensor) else None


def is_partial(axes: Sequence[str], shards_sequence: bool, shards_experts: bool) -> bool:
    """Whether each rank has only a part of the gradient of a replicated parameter of a module with these axes: that of its
    tokens, of its heads (norms of queries and keys), or of its part of the experts (the router, the gate of the shared one)."""
    router, shared_gate = axes[:1] == ("expert",), axes[:1] == ("one",)
    return shards_sequence or tuple(axes) == ("head",) or router or (shared_gate and shards_experts)


def sharded_dim(axes: Sequence[str], name: str) -> int | None:
    """Returns the dimension along which a parameter of a module with these axes is sharded; None if it is replicated."""
    if axes and axes[0] in ROW_AXES:
        return 0
    return 1 if len(axes) > 1 and axes[1] in COLUMN_AXES and name == "weight" else None


class TensorParallel:
    """Shards the weights of a model over the ranks of a mesh, and adds the collectives to its layers."""

    def __init__(
        self,
        mesh: DeviceMesh,
        mode: str,
        shard_experts: bool,
        kv_mesh: DeviceMesh | None = None,
        deferred: Deferred | None = None,
    ) -> None:
        """
        Args:
            mesh: the ranks of the tensor group, as a mesh of one dimension.
            mode: mtp, msp or fsp.
            shard_experts: whether each expert is sharded as an MLP is.
            kv_mesh: the same ranks with the dimensions ("heads", "kv_replicas"), if there are fewer key/value heads than ranks.
            deferred: where the gradients of weights are left, if the schedule computes them later.
        """
        self.shard_experts, self.deferred = shard_experts, deferred
        self.mesh, self.mode, self.size, self.rank = mesh, mode, mesh.size(), mesh.get_local_rank()
        self.kv_mesh = kv_mesh
        self.group: Group = mesh.get_group()
        self.shard_sequence = mode != "mtp"
        """Whether the sequence is sharded outside attention and MLP. It is turned off for generation, which computes one token
        at a time."""
        # Compiled, it could share a graph with other results, which the first part of a backward pass in two parts frees.
        self.local_part = local if deferred is None else not_compiled(local)

    def apply(self, model: Decoder) -> AppliedStrategy:
        """Shards the weights and replaces the layers' functions, in place. The model must be on the meta device."""
        partial_gradients: dict[str, Group] = {}
        for path, module in model.named_modules():
            axes = getattr(module, "axes", ())
            for name, parameter in list(module.named_parameters(recurse=False)) if not isinstance(module, ExpertLinear) else ():
                mesh, placements = self._placements(axes, name)
                if placements:
                    sharded = nn.Parameter(distribute_tensor(parameter.data, mesh, placements, src_data_rank=None))
                    module.register_parameter(name, sharded)
                if Replicate() in placements:  # each replica of a key/value head has the gradient from its own query heads only
                    partial_gradients[f"{path}.{name}"] = mesh.get_group("kv_replicas")
                elif not placements and (self._is_partial(axes) or ADAPTER_INFIX in f"{path}."):
                    partial_gradients[f"{path}.{name}"] = self.group
            if isinstance(module, Adapter):
                module.local_part = local
            elif isinstance(module, Attention):
                self._attention(module, model.config.num_heads, model.config.num_kv_heads)
            elif isinstance(module, LatentAttention):
                module.share_latents, module.finish = self._share_latents, self._finish
                module.project_q = module.project_kv = self._products
                module.kv_heads = model.config.num_heads // self.size
            elif isinstance(module, GatedMLP):
                module.project, module.finish = self._project, self._finish
        model.tie()
        if self.shard_experts:
            self._experts(model)
        if model.embed is not None:
            model.embed.look_up = self._look_up
        if (head := model.head) is not None:
            head.whole_rows, head.logits, head.loss = local, self._logits, partial(self._loss, model.config.vocab_size)
        return AppliedStrategy(partial_gradients, (self,))

    def _experts(self, model: Decoder) -> None:
        """Makes layers with experts gather their input and reduce their output once, for all experts and the shared one."""
        model.pool = self._pool
        for module in model.modules():
            if isinstance(module, MoE):
                module.enter, module.leave = self._copy_or_gather, self._reduce_or_scatter
                if isinstance(module.shared, GatedMLP):
                    module.shared.project, module.shared.finish = self._products, self._partial_sum

    def _is_partial(self, axes: Sequence[str]) -> bool:
        return is_partial(axes, self.shard_sequence, self.shard_experts)

    def _placements(self, axes: Sequence[str], name: str) -> tuple[DeviceMesh, list[Placement]]:
        """Returns the mesh over which a parameter is sharded, and its placements; no placements if it stays a plain tensor."""
        dim = sharded_dim(axes, name)
        if dim is not None and axes[0] == "kv_heads" and self.kv_mesh is not None:
            return self.kv_mesh, [Shard(dim), Replicate()]
        return self.mesh, [] if dim is None else [Shard(dim)]

    def _attention(self, module: Attention, heads: int, kv_heads: int) -> None:
        module.project, module.finish = self._project, self._finish
        module.kv_heads = max(1, kv_heads // self.size)
        share = heads // self.size
        module.own_heads = lambda values: values[self.rank * share : (self.rank + 1) * share]

    # The functions that replace those of the layers -------------------------------------------------------------------

    def _copy_or_gather(self, x_BSD: Tensor) -> Tensor:
        """Makes the input of sharded weights: all tokens on every rank. Its gradient is summed over the ranks."""
        return collectives.gather_tokens(x_BSD, self.group) if self.shard_sequence else collectives.copy(x_BSD, self.group)

    def _share_latents(self, parts: Sequence[Tensor]) -> Sequence[Tensor]:
        joined = self._copy_or_gather(torch.cat(tuple(parts), dim=-1))
        return joined.split([part.shape[-1] for part in parts], dim=-1)

    def _reduce_or_scatter(self, x_BSD: Tensor) -> Tensor:
        """Makes the output from the partial sums of the ranks: their sum, or this rank's tokens of it."""
        return collectives.scatter_tokens(x_BSD, self.group) if self.shard_sequence else collectives.reduce(x_BSD, self.group)

    def _project(self, x_BSD: Tensor, linears: Sequence[Linear]) -> list[Tensor]:
        adapted = any(linear.lora is not None for linear in linears)
        if self.mode == "fsp" and self.shard_sequence and not adapted:  # adapters need the gathered input for their gradients
            weights = [self.local_part(linear.weight) for linear in linears]
            if self.deferred is None:
                outs = list(_GatheredInputLinears.apply(x_BSD, self.group, None, (), *weights))
            else:
                outs = list(_deferred_input_linears(x_BSD, self.group, self.deferred, weights))
            return [out if linear.bias is None else out + local(linear.bias) for out, linear in zip(outs, linears, strict=True)]
        return self._products(self._copy_or_gather(x_BSD), linears)

    def _products(self, x_BSD: Tensor, linears: Sequence[Linear]) -> list[Tensor]:
        """Computes this rank's part of linears from all tokens."""
        parts = [(self.local_part(linear.weight), None if linear.bias is None else local(linear.bias)) for linear in linears]
        return [linear.adapt(x_BSD, linear.product(x_BSD, *part)) for linear, part in zip(linears, parts, strict=True)]

    def _finish(self, x_BSF: Tensor, linear: Linear) -> Tensor:
        out_BSD = self._reduce_or_scatter(self._partial_sum(x_BSF, linear))
        return out_BSD if linear.bias is None else out_BSD + linear.bias

    def _partial_sum(self, x_BSF: Tensor, linear: Linear) -> Tensor:
        """Computes this rank's summand of a linear's output, without the bias."""
        return linear.adapt(x_BSF, linear.product(x_BSF, self.local_part(linear.weight), None))

    def _pool(self, sums: dict[int, Routing]) -> dict[int, Routing]:
        """Each rank has the routers' sums over all tokens, and the gradients of the routers are summed over the ranks: so each
        rank takes its share of the gradient of the routers' losses."""
        share = 1 / self.size
        return {
            layer: r._replace(probs=scale_gradient(r.probs, share), z=scale_gradient(r.z, share)) for layer, r in sums.items()
        }

    def _look_up(self, tokens_BS: Tensor, weight_VD: Tensor) -> Tensor:
        rows_VD = local(weight_VD)
        row_numbers = tokens_BS - self.rank * rows_VD.shape[0]
        is_local = (row_numbers >= 0) & (row_numbers < rows_VD.shape[0])
        x_BSD = F.embedding(row_numbers.clamp(0, rows_VD.shape[0] - 1), rows_VD)
        return self._reduce_or_scatter(torch.where(is_local.unsqueeze(-1), x_BSD, 0.0))

    def _logits(self, x_BSD: Tensor, weight_VD: Tensor) -> Tensor:
        """Returns the full logits [B, S, V] on every rank. Used for generation."""
        out_BSV = F.linear(self._copy_or_gather(x_BSD), weight_VD)
        return all_gather(out_BSV.movedim(-1, 0), self.group).movedim(0, -1)

    def _loss(
        self, vocabulary: int, x_BSD: Tensor, weight_VD: Tensor, labels_BS: Tensor, smoothing: float, softcap: float
    ) -> tuple[Tensor, Tensor]:
        """Computes the sum of all losses on every rank. For each token, one rank reports the loss and the others report 0, so
        that a sum over the ranks counts each token once."""
        shard = ops.VocabShard(self.rank * weight_VD.shape[0], vocabulary, self._stack)
        x_TD = self._copy_or_gather(x_BSD).flatten(0, 1)
        total, losses = ops.linear_cross_entropy(x_TD, weight_VD, labels_BS.flatten(), smoothing, softcap, shard)
        share = losses.numel() // self.size
        reported = torch.zeros_like(losses)
        end = losses.numel() if self.rank == self.size - 1 else (self.rank + 1) * share
        reported[self.rank * share : end] = losses[self.rank * share : end]
        return total, reported.view(labels_BS.shape)

    def _stack(self, x: Tensor) -> Tensor:
        return all_gather(x.unsqueeze(0), self.group)


@not_compiled
def _deferred_input_linears(x_BSD: Tensor, group: Group, deferred: Deferred, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return _GatheredInputLinears.apply(x_BSD, group, deferred, tuple(weights), *(weight.detach() for weight in weights))


class _GatheredInputLinears(torch.autograd.Function):
    """fsp: linears that share a gathered input, of which only this rank's tokens are kept for the backward pass."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx, x_BSD: Tensor, group: Group, deferred: Deferred | None, deferred_weights: tuple[Tensor, ...], *weights: Tensor
    ):
        ctx.group, ctx.deferred, ctx.deferred_weights = group, deferred, deferred_weights
        ctx.save_for_backward(x_BSD, *weights)
        all_SBD = all_gather(tokens_first(x_BSD), group)
        return tuple(F.linear(all_SBD, weight).transpose(0, 1) for weight in weights)

    @staticmethod
    def backward(ctx, *grads: Tensor):  # type: ignore[no-untyped-def]
        x_BSD, *weights = ctx.saved_tensors
        grads_SBF = [tokens_first(grad) for grad in grads]
        if ctx.deferred is None:
            # The input is gathered while its gradient is computed, which is scattered while those of the weights are.
            gathering = start_all_gather([tokens_first(x_BSD)], ctx.group)
        grad_SBD = grads_SBF[0] @ weights[0]
        for grad_SBF, weight in zip(grads_SBF[1:], weights[1:], strict=True):
            grad_SBD += grad_SBF @ weight
        scattering = start_reduce_scatter([grad_SBD], ctx.group)
        grad_weights: list[Tensor | None] = [None] * len(weights)
        if ctx.deferred is None:
            all_SBD = wait(gathering[0])
            grad_weights = [product(grad_SBF, all_SBD) for grad_SBF in grads_SBF]
        else:
            group, x_BSD = ctx.group, x_BSD.detach()

            def products() -> list[Tensor]:
                all_SBD = all_gather(tokens_first(x_BSD), group)
                return [product(grad_SBF, all_SBD) for grad_SBF in grads_SBF]

            ctx.deferred.leave(ctx.deferred_weights, products)
        return wait(scattering[0]).transpose(0, 1), None, None, None, *grad_weights
