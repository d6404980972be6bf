"""Pipeline parallel: each rank has some stages of the model, and micro-batches go through the stages of all ranks.

``orders.py`` says in which order a rank runs its forward and backward passes, ``stages.py`` how the layers are divided, and
``messages.py`` sends activations and gradients. Here the passes are carried out:

| pass     | receives                                         | sends                                              |
|----------|--------------------------------------------------|----------------------------------------------------|
| forward  | the residual stream, from the stage before       | the residual stream, to the stage after            |
| backward | the gradient of its output, from the stage after | the gradient of its input, to the stage before     |

A message has A bytes: one activation of the residual stream, of this rank's tokens. With ``m`` micro-batches, two neighbouring
stages on different ranks exchange ``m`` messages in each direction per step. From the forward to the backward pass, a stage
keeps its input and what autograd keeps; its output is freed as soon as it has been sent.

If the loss pools the routers of all layers (``loss.moe_loss_kind = "pooled"``), each message has a second tensor: the sums over
the layers so far (8 bytes per expert), or their gradient.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ..data.batches import MicroBatch
from ..models.decoder import Decoder
from ..models.layers import Cache, DecoderLayer
from ..models.losses import HandedOn, Loss, LossTerms
from .data_axis import DataAxis, Weights, shard_size
from .deferred import Deferred
from .messages import Channels, Message
from .orders import BACKWARD, FORWARD, Action, forwards, needs, orders, stages_on
from .schedule import OnResult, nothing
from .shards import local
from .spans import SEND
from .strategy import Collectives, Workload

TIED = "embed.weight"
"""Name of the weight that the first and the last stage of a pipeline share, if the embedding and the head are tied."""


def traffic(work: Workload) -> list[Collectives]:
    """Returns what a rank sends in a step (see above)."""
    layout, decoder = work.layout, work.decoder
    if layout.pipeline == 1:
        return []
    tokens = work.tokens // layout.tensor if layout.shards_sequence else work.tokens
    here = stages_on(work.pipeline_rank, layout.pipeline, layout.chunks, work.schedule)
    neighbours = [stage + way for stage in here for way in (-1, 1) if 0 <= stage + way < layout.stages]
    sends = sum(layout.rank_of_stage(stage) != work.pipeline_rank for stage in neighbours)
    nbytes = tokens * decoder.hidden_size * work.element_bytes + work.pooled_bytes
    rows = [Collectives("send", "pipeline", 2 if work.pooled_bytes else 1, nbytes).times(sends * work.micro_batches)]
    if decoder.tie_embeddings and (work.embeddings or work.heads):
        rows.append(Collectives("all-reduce", "first and last", 1, 4 * _tied_shard(work)))
    return rows


def copied_elements(work: Workload) -> int:
    """Returns the number of elements of the weight that is on this rank twice: tied, in the first and in the last stage."""
    twice = len(work.on_rank) > 1 and work.embeddings and work.heads and work.decoder.tie_embeddings
    return _tied_shard(work) if twice else 0


def _tied_shard(work: Workload) -> int:
    rows = work.decoder.vocab_size // work.layout.inner
    return shard_size((rows, work.decoder.hidden_size), work.layout.zero, work.zero_rank)


class Chunk(NamedTuple):
    """A stage that is on this rank."""

    stage: int
    """The number of the stage in the whole pipeline."""
    model: Decoder
    axis: DataAxis
    deferred: Deferred | None = None
    """Where its backward passes leave the gradients of weights, if the schedule computes them later."""


class InFlight(NamedTuple):
    """What a forward pass leaves for its backward pass."""

    inputs: Message
    """What the stage before has handed on, which gets gradients; empty in the first stage."""
    outputs: list[GradientEdge | None]
    """What it has handed on itself, whose gradients the next stage sends; None for what depends on nothing that is trained.
    Empty in the last stage."""
    loss: Tensor | None
    """The scaled loss of this stage: that of the tokens, that of its routers, or both."""


class Chunks:
    """The data axes of the model chunks of a pipeline rank, as one."""

    def __init__(self, axes: Sequence[DataAxis], tied: dist.ProcessGroup | None) -> None:
        """
        Args:
            tied: for tied embeddings, on a rank of the first or the last stage: both ranks that have the weight.
        """
        self.axes, self.tied = axes, tied
        self.masters = {name: master for axis in reversed(axes) for name, master in axis.masters.items()}
        self.model_weights = {name: weight for axis in reversed(axes) for name, weight in axis.model_weights.items()}
        tied_here = [axis.masters[TIED] for axis in axes if TIED in axis.masters]
        self.copies: Sequence[nn.Parameter] = tied_here[1:]
        """The tied weight of the last stage, if the first is on this rank as well: a copy, which the optimizer does not see."""

    @torch.no_grad()
    def masters_changed(self) -> None:
        for copy in self.copies:
            local(copy).copy_(local(self.masters[TIED]))
        for axis in self.axes:
            axis.masters_changed()

    def masters_updated(self) -> None:
        if self.copies:  # the optimizer has not seen them, nor the model's weight that belongs to each
            self.masters_changed()
        for axis in self.axes:
            axis.masters_updated()

    def after_forwards(self) -> None:
        for axis in self.axes:
            axis.after_forwards()

    @torch.no_grad()
    def after_backwards(self) -> None:
        """Completes the gradients. That of a tied embedding is the sum of those of the first and the last stage."""
        for axis in self.axes:
            axis.after_backwards()
        for copy in self.copies:
            if (grad := self.masters[TIED].grad) is not None and copy.grad is not None:
                local(grad).add_(local(copy.grad))
                copy.grad = None
        if self.tied is not None and (grad := self.masters[TIED].grad) is not None:
            dist.all_reduce(local(grad), group=self.tied)

    def replica_count(self, name: str) -> int:
        axis = next(axis for axis in self.axes if name in axis.masters)
        return axis.replica_count(name) * (2 if name == TIED and self.tied is not None else 1)

    @contextmanager
    def unsharded_sequences(self) -> Iterator[None]:
        with ExitStack() as stack:
            for axis in self.axes:
                stack.enter_context(axis.unsharded_sequences())
            yield


@dataclass
class Step:
    """The micro-batches of a step, or of a part of an evaluation."""

    micro_batches: Sequence[MicroBatch]
    """On the host. A forward pass copies to the device what its stage needs."""
    terms: LossTerms
    scale: float
    on_result: OnResult
    in_flight: dict[tuple[int, int], InFlight] = field(default_factory=dict)
    """(stage, micro-batch) -> what its backward pass needs."""
    left: dict[tuple[int, int], list[Callable[[], None]]] = field(default_factory=dict)
    """(stage, micro-batch) -> what computes the gradients of the weights that its backward pass has left for later."""


def to_device(micro_batch: MicroBatch, model: Decoder, device: torch.device) -> MicroBatch:
    """Copies what a stage needs of a micro-batch to the device; the rest has the right shape, and no memory.

    The embedding needs tokens; the loss needs labels and dataset types; routers need labels, because their losses are weighted
    by the number of predicted tokens.
    """
    stage, config = model.stage, model.config
    routes = any(config.is_sparse(layer) for layer in stage.layers)

    def copied(tensor: Tensor, needed: bool) -> Tensor:
        if needed:
            return tensor.to(device, non_blocking=True)
        return torch.empty(1, dtype=tensor.dtype, device=device).expand(tensor.shape)

    return MicroBatch(
        copied(micro_batch.tokens, stage.embeds), copied(micro_batch.labels, stage.heads or routes),
        copied(micro_batch.types, stage.heads), micro_batch.cu_seqlens,
    )  # fmt: skip


class Pipeline:
    """The schedule of a pipeline: this rank's part of it."""

    def __init__(self, mode: str, chunks: Sequence[Chunk], axis: Weights, channels: Channels, sequence_ranks: int) -> None:
        """
        Args:
            mode: "1F1B", "ZBH1" or "ZBV" (``orders.orders``).
            axis: the data axes of the chunks, as one.
            sequence_ranks: number of ranks that share the residual stream of a micro-batch.
        """
        self.chunks = {chunk.stage: chunk for chunk in chunks}
        self.axis, self.channels, self.sequence_ranks = axis, channels, sequence_ranks
        self.after_pass: Callable[[Action], None] = nothing
        size, per_rank = channels.size, len(chunks)
        self._training = cache(lambda count: channels.plan(orders(mode, size, per_rank, count)))
        self._evaluation = cache(lambda count: channels.plan(forwards(mode, size, per_rank, count)))

    def train(self, micro_batches: Sequence[MicroBatch], terms: LossTerms, scale: float, on_result: OnResult) -> None:
        """Runs the passes of this rank in the order of the schedule."""
        count = len(micro_batches)
        step = Step(micro_batches, terms, scale, on_result)
        plan = self._training(count)
        config = next(iter(self.chunks.values())).model.config
        pooled = config.experts.count if config.experts and terms.pools(config) else 0
        self.channels.expect(plan, self._shape(micro_batches[0]), pooled)
        for action in plan.order:
            self._run(action, step)
            self.after_pass(action)
        with self.channels.spans(SEND, plan.order[-1]):
            self.channels.wait()
        self.axis.after_backwards()

    @torch.no_grad()
    def evaluate(self, micro_batches: Iterable[MicroBatch], on_result: OnResult) -> None:
        """Runs forward passes, of as many micro-batches at a time as there are pipeline ranks."""
        for chunk in self.chunks.values():
            chunk.model.eval()
        iterator = iter(micro_batches)
        while group := list(itertools.islice(iterator, self.channels.size)):
            step = Step(group, LossTerms(), 1.0, on_result)
            plan = self._evaluation(len(group))
            self.channels.expect(plan, self._shape(group[0]))
            for action in plan.order:
                self._run(action, step)
            self.channels.wait()
        for chunk in self.chunks.values():
            chunk.model.train()
        self.axis.after_forwards()

    def _shape(self, micro_batch: MicroBatch) -> tuple[int, int, int]:
        """Returns the shape of this rank's residual stream; that of all micro-batches of a step is the same."""
        rows, tokens = micro_batch.tokens.shape
        return rows, tokens // self.sequence_ranks, next(iter(self.chunks.values())).model.config.hidden_size

    def _run(self, action: Action, step: Step) -> None:
        """Runs one pass: receives what it needs from another stage, and sends its result."""
        needed = needs(action, len(self.channels.rank_of))
        received: Message = ()
        if needed is not None and needed.stage != action.stage:
            received = self.channels.take(needed)
        result: Message = ()
        last = action.micro_batch == len(step.micro_batches) - 1  # a stage has the micro-batches in their order
        with self.channels.spans(action.kind, action):
            if action.kind == FORWARD:
                result = self._forward(action, step, received)
            elif action.kind == BACKWARD:
                result = self._backward(action, step, received, last)
            else:
                self._weights(action, step, last)
        if result:
            self.channels.send(action, result)

    def _forward(self, action: Action, step: Step, received: Message) -> Message:
        """``received``: what the stage before has handed on."""
        _, stage, number = action
        model = self.chunks[stage].model
        batch = to_device(step.micro_batches[number], model, self.channels.device)
        inputs = [tensor.requires_grad_(torch.is_grad_enabled()) for tensor in received]
        result = model(
            batch.tokens, cu_seqlens=batch.cu_seqlens, labels=batch.labels, terms=step.terms,
            **dict(zip(("hidden", "pooled"), inputs, strict=False)),
        )  # fmt: skip
        step.on_result(batch, result)
        outputs = list[GradientEdge | None]()
        message: Message = ()
        if isinstance(result, HandedOn):
            message, loss = result.message(), result.routed.loss
            # An edge keeps the graph, and not the output.
            outputs = [get_gradient_edge(tensor) if tensor.requires_grad else None for tensor in message]
        else:
            assert isinstance(result, Loss)
            loss = result.total
        if torch.is_grad_enabled():
            step.in_flight[stage, number] = InFlight(inputs, outputs, None if loss is None else loss * step.scale)
        return message

    def _backward(self, action: Action, step: Step, received: Message, last: bool) -> Message:
        """``received``: the gradients of what it has handed on, from the stage after."""
        _, stage, number = action
        chunk, (inputs, outputs, loss) = self.chunks[stage], step.in_flight.pop((stage, number))
        roots: list[Tensor | GradientEdge] = []
        gradients: list[Tensor | None] = []
        for output, gradient in zip(outputs, received, strict=True):
            if output is not None:
                roots, gradients = [*roots, output], [*gradients, gradient]
        if loss is not None:
            roots, gradients = [*roots, loss], [*gradients, None]
        chunk.axis.before_backward(last and chunk.deferred is None)
        if roots:
            torch.autograd.backward(cast(Any, roots), gradients)  # both kinds may be mixed
        if chunk.deferred is not None:
            step.left[stage, number] = chunk.deferred.take()
        return [torch.zeros_like(x) if x.grad is None else x.grad for x in inputs]

    def _weights(self, action: Action, step: Step, last: bool) -> None:
        _, stage, number = action
        left = deque(step.left.pop((stage, number)))
        while left:
            left.popleft()()  # what it has kept is freed
        self.chunks[stage].axis.after_weights(last)


class PipelinedModel(nn.Module):
    """The stages of this rank, and the way to the others: for generation, a whole decoder."""

    def __init__(self, mode: str, chunks: Sequence[Chunk], channels: Channels) -> None:
        super().__init__()
        self.stages = nn.ModuleList(chunk.model for chunk in chunks)
        self.chunks, self.channels = chunks, channels
        self.config = chunks[0].model.config
        self.plan = channels.plan(forwards(mode, channels.size, len(chunks), 1))

    def numbered_layers(self) -> list[tuple[int, DecoderLayer]]:
        """Returns the layers of this rank, with their numbers in the whole decoder."""
        return [pair for chunk in self.chunks for pair in chunk.model.numbered_layers()]

    def forward(self, tokens: Tensor, caches: list[Cache], last_only: bool = False) -> Tensor:
        """Computes the logits [B, S, V], on every rank of the pipeline.

        Args:
            tokens: int64 [B, S].
            caches: the caches of this rank's layers.
            last_only: compute the logits of the last token of each row only [B, 1, V].
        """
        channels, config = self.channels, self.config
        channels.expect(self.plan, (*tokens.shape, config.hidden_size))
        logits, rest = None, iter(caches)
        for stage, model, *_ in self.chunks:
            hidden = channels.take(Action(FORWARD, stage - 1, 0))[0] if stage else None
            mine = list(itertools.islice(rest, len(model.layers)))
            result = model(tokens, caches=mine, hidden=hidden, last_only=last_only)
            if isinstance(result, HandedOn):
                channels.send(Action(FORWARD, stage, 0), result.message())
            else:
                logits = result.contiguous()
        channels.wait()
        if logits is None:
            shape = (tokens.shape[0], 1 if last_only else tokens.shape[1], config.vocab_size)
            logits = torch.empty(shape, dtype=channels.dtype, device=channels.device)
        # All pipelines compute the same. One of them gives its result to all ranks, and no pipeline needs a group of its own.
        dist.broadcast(logits, channels.first[channels.rank_of[-1]])
        return logits
