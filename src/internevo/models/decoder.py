"""A pre-norm decoder: embedding, layers, norm, head."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .config import DecoderConfig
from .layers import Cache, Context, DecoderLayer, Embedding, Head, RMSNorm
from .lora import add_adapters
from .losses import Loss, LossTerms, add_router_losses
from .rotary import tables


class Decoder(nn.Module):
    """``model(tokens, positions=None, cu_seqlens=None) -> logits``."""

    def __init__(self, config: DecoderConfig, embed_grad_scale: float = 1.0) -> None:
        super().__init__()
        self.config = config
        vocab, size = config.vocab_size, config.hidden_size
        scale = math.sqrt(size) if config.scale_embedding else 1.0
        self.embed = Embedding(vocab, size, scale, embed_grad_scale)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(size, config.norm_eps, config.norm_unit_offset)
        self.head = Head(vocab, size, config.norm_head, embed_grad_scale)
        self.tie()
        if config.lora is not None:
            add_adapters(self, config.lora)

    def tie(self) -> None:
        """Makes the head the embedding's weight, where the model has it so. After anything that makes new parameters."""
        if self.config.tie_embeddings:
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
    ) -> Tensor | Loss:
        """Logits of the next token; or, with ``labels``, the loss, without holding all logits.

        Args:
            tokens: ids, int64 [B, S].
            positions: each token's position in its document [B, S]; by default counted from the row's or document's start.
            cu_seqlens: int32 [documents + 1], borders of the documents packed into one row (then B = 1). It may be on the
                host, which spares a wait for the device.
            labels: the id to be predicted at each token, or -100 [B, S].
            terms: weights of the loss's terms.
            caches: one per layer, for generation; the keys and values of ``tokens`` are added to them.

        Returns:
            [B, S, V]; or the loss, with ``labels``.
        """
        x_BSD = self.embed(tokens)
        context = self._context(tokens, positions, cu_seqlens, caches, x_BSD.dtype)
        routing = []
        for number, layer in enumerate(self.layers):
            x_BSD, routed = layer(x_BSD, context, caches[number] if caches is not None else None)
            if routed is not None:
                routing.append(routed)
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
            torch._dynamo.maybe_mark_dynamic(cu_seqlens, 0)
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
