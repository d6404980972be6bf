"""What is predicted: the sizes of a step, and how it computes and communicates."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from ..config import Config
from ..config.data import Data, name_of
from ..data.tokenized.index import dataset_type
from ..models.config import DecoderConfig, Stage
from ..parallel.layout import Layout
from ..parallel.stages import cut, deal, head_cost, layer_costs
from ..parallel.strategy import Workload


class Again(NamedTuple):
    """The shares of what a layer computes in its forward pass that it computes again in its backward pass."""

    products: float
    attention: float
    memory: float


@dataclass(frozen=True)
class Job:
    """A step of a run."""

    work: Workload
    """The sizes, of no rank in particular."""
    seq_len: int
    """Tokens of a row."""
    precision: str = "bf16"
    """In which the products of the layers are computed: "bf16" (which stands for fp16, too) or "fp8"; the head is in bf16."""
    document_len: int = 0
    """Tokens of a document, on average: what tokens attend within. 0: a row is one document."""
    overlaps_gradients: bool = True
    """Whether gradients are reduced while a backward pass runs (``overlap_sync_grad``; FSDP always does)."""
    overlaps_weights: bool = True
    """Whether weights are gathered while a pass runs (``overlap_sync_param``; FSDP always does)."""
    compiled: bool = False
    """Whether layers are compiled (``model.compile``), so that kernels which only move memory become one with others."""
    imbalance: float = 1.0
    """Tokens of the rank whose experts get the most, divided by the mean."""
    keeps_scores: bool = False
    """Whether attention writes the scores of all pairs of tokens to memory and keeps them, as was usual before FlashAttention
    (``ops.attention`` never does): only others' measurements need it."""
    again: Again | None = None
    """What is recomputed, if it is not what ``model.checkpoint`` can say."""
    layers: tuple[int, ...] = ()
    """Number of layers of each stage. Empty: they are divided by cost."""
    types: int = 1
    """Number of dataset types, whose losses are added up apart."""
    iterations: int = 0
    """Of Muon; 0: AdamW updates all weights."""

    @classmethod
    def from_config(cls, decoder: DecoderConfig, config: Config, layout: Layout, micro_batches: int) -> Job:
        """Takes the sizes from a run's config.

        Args:
            micro_batches: micro-batches per step on each data rank.
        """
        zero = config.hybrid_zero_optimizer
        work = replace(Workload.from_config(decoder, config, layout, micro_batches, "cuda"), stages=(), pipeline_rank=0)
        return cls(
            work, config.data.seq_len,
            overlaps_gradients=layout.fsdp or zero.overlap_sync_grad,
            overlaps_weights=layout.fsdp or zero.overlap_sync_param,
            compiled=config.model.compile,
            layers=tuple(config.parallel.pipeline.layers),
            types=max(1, len(dataset_types(config.data))),
            iterations=config.muon.steps if config.muon is not None else 0,
        )  # fmt: skip

    @property
    def global_tokens(self) -> int:
        """Tokens of a global batch."""
        return self.work.tokens * self.work.micro_batches * self.work.layout.data

    def stages(self) -> tuple[Stage, ...]:
        """Returns the stages of the pipeline, in the order in which a micro-batch goes through them."""
        decoder, count = self.work.decoder, self.work.layout.stages
        if self.layers or count == 1:
            return cut(self.layers or (decoder.num_layers,))
        return cut(_dealt(tuple(layer_costs(decoder, self.seq_len)), count, head_cost(decoder)))

    def on_rank(self, pipeline_rank: int) -> Workload:
        """Returns the sizes of a pipeline rank."""
        on = self.work.layout.rank_of_stage
        stages = tuple(stage for number, stage in enumerate(self.stages()) if on(number) == pipeline_rank)
        return replace(self.work, stages=stages, pipeline_rank=pipeline_rank)

    def attended(self, layer: int) -> float:
        """Returns how many tokens a token attends to in a layer, on average."""
        return self.work.decoder.attended(layer, min(self.document_len or self.seq_len, self.seq_len))


@lru_cache(maxsize=256)
def _dealt(costs: tuple[float, ...], parts: int, last: float) -> tuple[int, ...]:
    """``deal``, which takes much longer than all other formulas, once for each question."""
    return tuple(deal(costs, parts, last))


def dataset_types(data: Data) -> list[str]:
    """Returns the dataset types of a run's data, as far as the data are here."""
    if data.mixture:
        return [name_of(part) for part in data.mixture]
    if not data.folders[0]:
        return []
    folder = Path(data.folders[0])
    return sorted({dataset_type(folder, str(path.relative_to(folder))) for path in folder.rglob("*.bin")})
