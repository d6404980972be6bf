"""A pre-norm decoder: embedding, layers, norm, head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .config import DecoderConfig
from .layers import Cache, Context, DecoderLayer, Embedding, Head, RMSNorm
from .rotary import tables


class Decoder(nn.Module):
    """``model(tokens, positions=None, cu_seqlens=None) -> logits``."""

    def __init__(self, config: DecoderConfig, embed_grad_scale: float = 1.0) -> None:
        super().__init__()
        self.config = config
        self.embed = Embedding(config.vocab_size, config.hidden_size, embed_grad_scale)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.head = Head(config.vocab_size, config.hidden_size, embed_grad_scale)
        self._tie()

    def _tie(self) -> None:
        if self.config.tie_embeddings:
            self.head.weight = self.embed.weight

    def materialize(self, device: str | torch.device) -> None:
        """Gives a model made on the meta device uninitialised weights on ``device``; a tied head stays tied."""
        self.to_empty(device=device)
        self._tie()  # to_empty has made it a weight of its own

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        labels: Tensor | None = None,
        smoothing: float = 0.0,
        caches: list[Cache] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits of the next token; or, with ``labels``, the loss, without holding all logits.

        Args:
            tokens: ids, int64 [B, S].
            positions: each token's position in its document [B, S]; by default counted from the row's or document's start.
            cu_seqlens: int32 [documents + 1], borders of the documents packed into one row (then B = 1). It may be on the
                host, which spares a wait for the device.
            labels: the id to be predicted at each token, or -100 [B, S].
            smoothing: label smoothing.
            caches: one per layer, for generation; the keys and values of ``tokens`` are added to them.

        Returns:
            [B, S, V]; or (sum of losses, losses [B, S] in fp32) with ``labels``.
        """
        x_BSD = self.embed(tokens)
        context = self._context(tokens, positions, cu_seqlens, caches, x_BSD.dtype)
        for number, layer in enumerate(self.layers):
            x_BSD = layer(x_BSD, context, caches[number] if caches is not None else None)
        return self.head(self.norm(x_BSD), labels, smoothing)

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
        lengths = None
        if positions is None:
            positions = torch.arange(past, past + tokens.shape[1], device=tokens.device).expand(tokens.shape)
            if cu_seqlens is not None:
                starts = torch.repeat_interleave(cu_seqlens[:-1], cu_seqlens.diff(), output_size=tokens.shape[1])
                positions = positions - starts
        if self.config.rope.kind == "dynamic":
            lengths = _lengths(positions, cu_seqlens)
        cos, sin = tables(
            self.config.rope, self.config.head_dim, self.config.max_position_embeddings,
            positions, lengths, dtype,
        )  # fmt: skip
        return Context(cos, sin, cu_seqlens, max_seqlen)


def _lengths(positions: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Length of each token's document [B, S]."""
    if cu_seqlens is None:
        return (positions.amax(-1, keepdim=True) + 1).expand(positions.shape)
    sizes = cu_seqlens.diff()
    return torch.repeat_interleave(sizes, sizes, output_size=positions.shape[1]).unsqueeze(0)
