"""A pre-norm decoder: embedding, layers, norm, head."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor, nn

from ..ops.compiler import mark_dynamic
from .config import DecoderConfig, Stage
from .layers import Cache, Context, DecoderLayer, Embedding, Head, RMSNorm
from .lora import add_adapters
from .losses import Loss, LossTerms, add_router_losses, pool
from .rotary import tables


class Decoder(nn.Module):
    """``model(tokens, positions=None, cu_seqlens=None) -> logits``.

    A ``Stage`` of it has the same parameter names as the whole. With tied embeddings the last stage has the embedding's weight
    too, as its head.
    """

    def __init__(self, config: DecoderConfig, stage: Stage | None = None, embed_grad_scale: float = 1.0) -> None:
        """``stage``: the part to build; by default all of it."""
        super().__init__()
        self.config = config
        self.stage = stage = stage or Stage(range(config.num_layers))
        vocab, size = config.vocab_size, config.hidden_size
        self.embed: Embedding | None = None
        self.norm: RMSNorm | None = None
        self.head: Head | None = None
        if stage.embeds or (stage.heads and config.tie_embeddings):
            scale = math.sqrt(size) if config.scale_embedding else 1.0
            self.embed = Embedding(vocab, size, scale, embed_grad_scale)
        self.layers = nn.ModuleDict({str(number): DecoderLayer(config, number) for number in stage.layers})
        if stage.heads:
            self.norm = RMSNorm(size, config.norm_eps, config.norm_unit_offset)
            self.head = Head(vocab, size, config.norm_head, embed_grad_scale)
        self.pool = pool
        self.tie()
        if config.lora is not None:
            add_adapters(self, config.lora)

    def numbered_layers(self) -> list[tuple[int, DecoderLayer]]:
        """The layers of this stage, with their numbers in the whole model."""
        return [(int(number), cast(DecoderLayer, layer)) for number, layer in self.layers.items()]

    def tie(self) -> None:
        """Makes the head the embedding's weight, where the model has it so. After anything that makes new parameters."""
        if self.config.tie_embeddings and self.head is not None and self.embed is not None:
            self.head.weight = self.embed.weight

    def materialize(self, device: str | torch.device) -> None:
        """Gives a model made on the meta device uninitialised weights on ``device``; a tied head stays tied."""
        self.to_empty(device=device)
        self.tie()

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        labels: Tensor | None = None,
        terms: LossTerms = LossTerms(),
        caches: list[Cache] | None = None,
        hidden: Tensor | None = None,
    ) -> Tensor | Loss:
        """Logits of the next token; or, with ``labels``, the loss, without holding all logits.

        Args:
            tokens: ids, int64 [B, S].
            positions: each token's position in its document [B, S]; by default counted from the row's or document's start.
            cu_seqlens: int32 [documents + 1], borders of the documents packed into one row (then B = 1). It may be on the
                host, which spares a wait for the device.
            labels: the id to be predicted at each token, or -100 [B, S].
            terms: weights of the loss's terms.
            caches: one for each layer, for generation; the keys and values of ``tokens`` are added to them.
            hidden: for a stage that does not embed, the residual stream of the stage before [B, S, D].

        Returns:
            [B, S, V]; the loss, with ``labels``; or, of a stage without a head, the residual stream [B, S, D].
        """
        if self.stage.embeds:
            assert self.embed is not None
            hidden = self.embed(tokens)
        assert hidden is not None, "a stage that does not embed needs the residual stream of the stage before"
        x_BSD = hidden
        context = self._context(tokens, positions, cu_seqlens, caches, x_BSD.dtype)
        routing = []
        for number, layer in enumerate(self.layers.values()):
            x_BSD, routed = layer(x_BSD, context, caches[number] if caches is not None else None)
            if routed is not None:
                routing.append(self.pool(routed))
        if self.norm is None or self.head is None:
            return x_BSD
        out = self.head(self.norm(x_BSD), labels, terms.smoothing)
        if labels is None:
            return out
        cross_entropy, losses = out
        return Loss(add_router_losses(cross_entropy, labels, routing, terms), losses, routing)

    def _context(
        self,
        tokens: Tensor,
        positions: Tensor | None,
        cu_seqlens: Tensor | None,
        caches: list[Cache] | None,
        dtype: torch.dtype,
    ) -> Context:
        """Angles and document borders, made once for all layers."""
        past = caches[0].length if caches else 0
        max_seqlen = 0
        if cu_seqlens is not None:
            # A power of two, so that a compiled layer meets few different values.
            max_seqlen = 1 << int((cu_seqlens[1:] - cu_seqlens[:-1]).max() - 1).bit_length()
            cu_seqlens = cu_seqlens.to(tokens.device, non_blocking=True)
            mark_dynamic(cu_seqlens, 0)
        rope = self.config.rope
        if rope is None:
            return Context(None, None, cu_seqlens, max_seqlen)
        if positions is None:
            positions = torch.arange(past, past + tokens.shape[1], device=tokens.device).expand(tokens.shape)
            if cu_seqlens is not None:
                starts = torch.repeat_interleave(cu_seqlens[:-1], cu_seqlens.diff(), output_size=tokens.shape[1])
                positions = positions - starts
        lengths = _lengths(positions, cu_seqlens) if rope.kind == "dynamic" else None
        head_dim, longest = self.config.head_dim, self.config.max_position_embeddings
        cos, sin = tables(rope, head_dim, longest, positions, lengths, dtype)
        return Context(cos, sin, cu_seqlens, max_seqlen)


def _lengths(positions: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Length of each token's document [B, S]."""
    if cu_seqlens is None:
        return (positions.amax(-1, keepdim=True) + 1).expand(positions.shape)
    sizes = cu_seqlens.diff()
    return torch.repeat_interleave(sizes, sizes, output_size=positions.shape[1]).unsqueeze(0)


def parameter_shapes(config: DecoderConfig) -> dict[str, torch.Size]:
    """Name and shape of every parameter; a tied head is none of its own."""
    with torch.device("meta"):
        return {name: p.shape for name, p in Decoder(config).named_parameters()}
