"""A pre-norm decoder: embedding, layers, norm, head."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..ops.compiler import mark_dynamic
from .config import DecoderConfig, Stage
from .layers import Cache, Context, DecoderLayer, Embedding, Head, RMSNorm, alibi_slopes, all_queries
from .lora import add_adapters
from .losses import HandedOn, Loss, LossTerms, Routed, add_pooled, pool, router_losses
from .moe import MoE, Router
from .rotary import NEED_LENGTHS, tables


class Decoder(nn.Module):
    """A decoder, or one pipeline stage of it: ``model(tokens, positions=None, cu_seqlens=None) -> logits``.

    The parameters of a stage have the same names as in the whole decoder. If the head is tied to the embedding, the last stage
    has the embedding's weight too.
    """

    def __init__(self, config: DecoderConfig, stage: Stage | None = None, embed_grad_scale: float = 1.0) -> None:
        """
        Args:
            stage: the part to build. None: the whole decoder.
            embed_grad_scale: the gradients of the embedding and the head are multiplied by this.
        """
        super().__init__()
        self.config = config
        self.stage = stage = stage or Stage(range(config.num_layers))
        vocab, size = config.vocab_size, config.hidden_size
        self.embed: Embedding | None = None
        self.norm: RMSNorm | None = None
        self.head: Head | None = None
        if stage.embeds or (stage.heads and config.tie_embeddings):
            scale = math.sqrt(size) if config.scale_embedding else 1.0
            self.embed = Embedding(vocab, size, scale * config.embedding_multiplier, embed_grad_scale)
        self.layers = nn.ModuleDict({str(number): DecoderLayer(config, number) for number in stage.layers})
        if stage.heads:
            self.norm = RMSNorm(size, config.norm_eps, config.norm_unit_offset)
            self.head = Head(vocab, size, config.norm_head, embed_grad_scale, config.logit_softcap)
        self.pool, self.queries = pool, all_queries
        self.tie()
        if config.lora is not None:
            add_adapters(self, config.lora)

    def numbered_layers(self) -> list[tuple[int, DecoderLayer]]:
        """Returns the layers of this stage, with their numbers in the whole decoder."""
        return [(int(number), cast(DecoderLayer, layer)) for number, layer in self.layers.items()]

    def stored(self) -> dict[str, Tensor]:
        """Returns all that a checkpoint has of this model: its parameters and the routers' balance biases."""
        return {**dict(self.named_parameters()), **balance_biases(self.numbered_layers())}

    def tie(self) -> None:
        """Makes the head use the embedding's weight, if the model has tied embeddings.

        Call this after everything that replaces parameters.
        """
        if self.config.tie_embeddings and self.head is not None and self.embed is not None:
            self.head.weight = self.embed.weight

    def materialize(self, device: str | torch.device) -> None:
        """Gives a model that was made on the meta device uninitialised weights on ``device``. A tied head stays tied."""
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
        pooled: Tensor | None = None,
        last_only: bool = False,
    ) -> Tensor | Loss | HandedOn:
        """Computes the logits of the next token, or with ``labels`` the loss, for which the logits never exist all at once.

        Args:
            tokens: ids, int64 [B, S].
            positions: the position of each token in its document [B, S]. None: counted from the start of the row or document.
            cu_seqlens: for one packed row (B = 1): where its documents begin and end, int32 [documents + 1]. If it is on the
                host, the host need not wait for the device.
            labels: the id to be predicted at each token, or -100, int64 [B, S]. They are not shifted here, unlike in
                transformers: the label of a token is the id that follows it, as in
                ``model(tokens[:, :-1], labels=tokens[:, 1:])``.
            terms: the weights of the terms of the loss.
            caches: for generation: one for each layer. The keys and values of ``tokens`` are added to them.
            hidden, pooled: for a stage without the embedding: what the stage before has handed on.
            last_only: compute the logits of the last token of each row only [B, 1, V].

        Returns:
            The logits [B, S, V]; or the loss, if there are labels. A stage without a head returns what it hands on to the next.

        Raises:
            UsageError: if the labels are the tokens themselves, as transformers wants them.
        """
        if labels is not None:
            check_labels(tokens, labels)
        if self.stage.embeds:
            assert self.embed is not None
            hidden = self.embed(tokens)
        assert hidden is not None, "a stage without the embedding needs the residual stream of the stage before (hidden)"
        x_BSD = hidden
        contexts = self._contexts(tokens, positions, cu_seqlens, caches, x_BSD.dtype)
        sums = {}
        for place, (number, layer) in enumerate(self.layers.items()):
            context = contexts[self.config.rotary(int(number))]
            x_BSD, routing = layer(x_BSD, context, caches[place] if caches is not None else None)
            if routing is not None:
                sums[int(number)] = routing
        sums = self.pool(sums)
        if labels is not None and self.config.experts is not None and terms.pools(self.config):
            nothing = torch.zeros(2, self.config.experts.count, device=x_BSD.device)
            pooled = add_pooled(nothing if pooled is None else pooled, sums.values())
        in_loss = pooled if self.stage.heads else None
        losses = None if labels is None else router_losses(labels, sums, terms, in_loss, self.config.sparse_layers)
        routed = Routed(sums, losses)
        if self.norm is None or self.head is None:
            return HandedOn(x_BSD, pooled, routed)
        x_BSD = self.norm(x_BSD[:, -1:] if last_only else x_BSD)
        if self.config.logits_scaling != 1.0:  # here, and not in each form of the head and its loss
            x_BSD = x_BSD / self.config.logits_scaling
        out = self.head(x_BSD, labels, terms.smoothing)
        if labels is None:
            return out
        cross_entropy, losses = out
        return Loss(cross_entropy if routed.loss is None else cross_entropy + routed.loss, losses, routed)

    def _contexts(
        self,
        tokens: Tensor,
        positions: Tensor | None,
        cu_seqlens: Tensor | None,
        caches: list[Cache] | None,
        dtype: torch.dtype,
    ) -> dict[str, Context]:
        """Computes once what the layers need: the rotary embedding of all positions, and where documents begin and end.

        Returns:
            ``DecoderConfig.rotary`` -> what these layers need.
        """
        past = caches[0].length if caches else 0
        max_seqlen = 0
        if cu_seqlens is not None:
            # Rounded up to a power of two, so that a compiled layer is compiled for few different values.
            max_seqlen = 1 << int((cu_seqlens[1:] - cu_seqlens[:-1]).max() - 1).bit_length()
            cu_seqlens = cu_seqlens.to(tokens.device, non_blocking=True)
            mark_dynamic(cu_seqlens, 0)
        rope = self.config.rope
        if rope is None:
            return {"none": Context(None, None, cu_seqlens, max_seqlen, alibi_slopes(self.config.num_heads, tokens.device))}
        if positions is None:
            positions = torch.arange(past, past + tokens.shape[1], device=tokens.device).expand(tokens.shape)
            if caches and (first := caches[0].first) is not None:
                positions = (positions - first.unsqueeze(1)).clamp(min=0)
            if cu_seqlens is not None:
                starts = torch.repeat_interleave(cu_seqlens[:-1], cu_seqlens.diff(), output_size=tokens.shape[1])
                positions = positions - starts
        lengths = self.queries(_lengths(positions, cu_seqlens)) if rope.kind in NEED_LENGTHS else None
        positions = self.queries(positions)
        head_dim, longest = self.config.rotary_dim, self.config.max_position_embeddings
        ropes, found = {"usual": rope, "window": self.config.window_rope}, dict[str, Context]()
        for kind in {self.config.rotary(layer) for layer in self.stage.layers}:
            its = ropes.get(kind)
            cos, sin = tables(its, head_dim, longest, positions, lengths, dtype) if its else (None, None)
            found[kind] = Context(cos, sin, cu_seqlens, max_seqlen)
        return found


def check_labels(tokens: Tensor, labels: Tensor) -> None:
    """Refuses labels that are the tokens themselves and not those that follow, as far as this can be seen without waiting for a
    GPU. (Texts of one repeated token are both.)

    Raises:
        UsageError: if they are.
    """
    same = labels is tokens
    if type(labels) is Tensor and labels.device.type == "cpu" == tokens.device.type and tokens.shape[1] > 1:
        ids, wanted = tokens.detach().numpy(), labels.detach().numpy()  # PyTorch's probes do not see what NumPy does
        predicted = wanted != -100
        follows = (wanted[:, :-1] == ids[:, 1:]) | ~predicted[:, :-1]
        same = bool(predicted.any() and (wanted == ids)[predicted].all() and not follows.all())
    if same:
        raise UsageError(
            "labels= are the tokens themselves, which a model would only have to copy. Labels are not shifted here, unlike in "
            "transformers: the label of each token is the id that follows it. Call model(tokens[:, :-1], labels=tokens[:, 1:])"
        )


def _lengths(positions: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Returns the length of each token's document [B, S]."""
    if cu_seqlens is None:
        return (positions.amax(-1, keepdim=True) + 1).expand(positions.shape)
    sizes = cu_seqlens.diff()
    return torch.repeat_interleave(sizes, sizes, output_size=positions.shape[1]).unsqueeze(0)


def routers(layers: Iterable[tuple[int, DecoderLayer]]) -> dict[int, Router]:
    """Returns number of a layer -> its router, for those of ``numbered_layers()`` that have experts."""
    return {number: layer.mlp.router for number, layer in layers if isinstance(layer.mlp, MoE)}


def balance_biases(layers: Iterable[tuple[int, DecoderLayer]]) -> dict[str, Tensor]:
    """Returns the balance biases of the routers, under their names in the whole decoder."""
    found = {f"layers.{number}.mlp.router.bias": router.bias for number, router in routers(layers).items()}
    return {name: bias for name, bias in found.items() if bias is not None}


def parameter_shapes(config: DecoderConfig) -> dict[str, torch.Size]:
    """Returns the name and shape of every parameter. A tied head is not among them."""
    with torch.device("meta"):
        return {name: p.shape for name, p in Decoder(config).named_parameters()}


def stored_shapes(config: DecoderConfig) -> dict[str, torch.Size]:
    """Returns the name and shape of all that a checkpoint has of a model: its parameters and the routers' balance biases."""
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in Decoder(config).stored().items()}
