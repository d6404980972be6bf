"""A layout as a config says it, and the layouts that there are."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Literal, NamedTuple, TypeVar, get_args

from ..config import Config
from ..config import check as rules
from ..config.axes import context_size, data_size
from ..config.option import Section
from ..data.batches import BatchSizes
from ..models.families import registry
from ..parallel.layout import Layout

CHUNKS = (1, 2, 4, 8)
"""Numbers of model chunks of a rank that are tried."""
S = TypeVar("S", bound=Section)
Mode = Literal["mtp", "msp", "fsp", "isp"]
Schedule = Literal["1F1B", "ZBH1", "ZBV"]


class Choice(NamedTuple):
    """All that the planner may change in a config."""

    pipeline: int = 1
    schedule: Schedule = "1F1B"
    chunks: int = 1
    mode: Mode = "mtp"
    tensor: int = 1
    no_tp: bool = False
    """Whether experts are whole on each rank of the tensor axis."""
    expert: int = 1
    micro_bsz: int = 1
    weight: int = 1
    expert_weight: int = 1
    fsdp: bool = False
    zero: int = -1
    expert_zero: int = -1
    checkpoint: float | Literal["attention"] = 0.0
    selective: bool = False
    """Whether recomputation keeps the outputs of attention."""
    context: int = 1
    """Ranks of the tensor axis that share the queries (2D sequence parallelism)."""

    @classmethod
    def of(cls, config: Config, layout: Layout) -> Choice:
        """Returns the layout of a config."""
        return cls(
            layout.pipeline, config.parallel.pipeline.mode, layout.chunks, config.parallel.tensor.mode, layout.tensor,
            config.parallel.expert.no_tp, layout.expert, config.data.micro_bsz, layout.weight,
            layout.expert_inner if layout.mode == "isp" and config.model.num_experts > 1 else 1, layout.fsdp, layout.zero,
            layout.expert_zero if layout.experts_apart else -1, config.model.checkpoint, config.selective_checkpoint,
            layout.context,
        )  # fmt: skip

    @property
    def stages(self) -> tuple[int, int, Schedule]:
        """What the stages depend on: pipeline, chunks and schedule."""
        return self.pipeline, self.chunks, self.schedule

    @property
    def inner(self) -> int:
        """The number of ranks over which the weights of a layer are sharded, without those of experts."""
        return self.weight if self.mode == "isp" else self.tensor

    @property
    def expert_inner(self) -> int:
        """The number of ranks over which each expert is sharded."""
        return self.expert_weight if self.mode == "isp" else 1 if self.no_tp else self.tensor

    def layout(self, config: Config, world: int) -> Layout:
        """Returns ``Layout.from_config`` of the config with this layout, sooner."""
        heads = config.model.num_kv_attention_heads or config.model.num_attention_heads
        layout = Layout.of(
            world, self.tensor, self.mode, self.weight, self.pipeline, self.zero, self.fsdp, heads, self.chunks, self.schedule
        )
        if self.context > 1 or config.muon is not None:
            layout = layout.with_options(config, self.context)
        has_experts = config.model.num_experts > 1
        return layout.with_experts(self.expert, self.expert_inner, self.expert_zero) if has_experts else layout

    def apply(self, config: Config, rows: int) -> Config:
        """Returns the config with this layout. Stages are divided by cost, and what isp gathers is gathered in advance.

        Args:
            rows: the global batch.
        """
        parallel = config.parallel
        changed = {
            "pipeline": _changed(parallel.pipeline, size=self.pipeline, mode=self.schedule, layers=[]),
            "tensor": _changed(parallel.tensor, size=self.tensor, mode=self.mode),
            "weight": _changed(parallel.weight, size=self.weight, overlap=self.weight > 1),
            "zero1": _changed(parallel.zero1, size=self.zero, fsdp=self.fsdp),
            "fsdp": _changed(parallel.fsdp, enable=self.fsdp),
        }
        if parallel.sequence_2D.enable:
            head, context = self.tensor // self.context, self.context
            two = _changed(parallel.sequence_2D, enable=context > 1, head_size=head, context_size=context)
            changed["sequence_2D"] = two
        if config.model.num_experts > 1:
            overlap = self.expert_weight > 1
            changed |= {
                "expert": _changed(parallel.expert, size=self.expert, no_tp=self.no_tp),
                "expert_weight": _changed(parallel.expert_weight, size=self.expert_weight, overlap=overlap),
                "expert_zero1": _changed(parallel.expert_zero1, size=self.expert_zero),
            }
        data = _changed(config.data, global_batch_size=rows, micro_bsz=self.micro_bsz)
        model = _changed(config.model, num_chunks=self.chunks, checkpoint=self.checkpoint)
        return _changed(
            config, parallel=_changed(parallel, **changed), data=data, model=model, selective_checkpoint=self.selective
        )


def _changed(section: S, **values: object) -> S:
    return section.model_copy(update=values)


def is_legal(choice: Choice, config: Config, rows: int, world: int) -> bool:
    """Whether a config that can be trained can be with this layout, too. (Its files and tokenizers are not looked at again.)"""
    changed = choice.apply(config, rows)
    return not rules.problems(changed, world) and not any(registry.problems(changed.model_type, changed.model))


def in_rows(config: Config, world: int) -> Config | None:
    """Returns the config with its global batch and its ramp-up in rows, which mean the same in every layout; None if the config
    has only the micro-batches of a rank, and its own layout does not fit the world size."""
    parallel = config.parallel
    if config.data.global_batch_size:
        return config
    if world % (parallel.tensor.size * parallel.pipeline.size):
        return None
    sizes = BatchSizes.from_config(config.data, data_size(config, world))
    return _changed(config, data=_changed(config.data, **sizes.in_rows()))


def divisors(number: int) -> list[int]:
    """Returns all divisors, in ascending order."""
    return [n for n in range(1, number + 1) if number % n == 0]


def axes(config: Config, world: int) -> Iterator[Choice]:
    """Yields choices of the pipeline, tensor and expert axes. Not all of them are legal. 2D sequence parallelism is tried only
    if the config has it, with its number of context ranks."""
    experts, modes, has_experts = divisors(config.model.num_experts), get_args(Mode), config.model.num_experts > 1
    context = context_size(config)
    for pipeline in divisors(world):
        for mode, size, expert in product(modes, divisors(world // pipeline), experts):
            if mode == "isp" or size > 1 or mode == modes[0]:  # otherwise all modes are the same
                for no_tp in (False, True) if has_experts and mode != "isp" and size > 1 else (False,):
                    choice = Choice(pipeline=pipeline, mode=mode, tensor=size, no_tp=no_tp, expert=expert)
                    yield choice
                    if mode == "isp" and context > 1 and size % context == 0:
                        yield choice._replace(context=context)


def weights(choice: Choice, config: Config, world: int) -> Iterator[Choice]:
    """Yields a choice of ``axes`` with all weight and expert weight axes, with FSDP and without. Not all of them are legal."""
    has_experts, ranks, isp = config.model.num_experts > 1, world // choice.pipeline, choice.mode == "isp"
    experts = divisors(ranks // choice.expert) if isp and has_experts else [1]
    for weight, expert_weight in product(divisors(ranks) if isp else [1], experts):
        if not isp or max(choice.tensor, weight, expert_weight) > 1:  # otherwise it is the same as mtp
            for fsdp in (False, True) if ranks > 1 else (False,):  # on one rank, FSDP is the same as ZeRO
                yield choice._replace(weight=weight, expert_weight=expert_weight, fsdp=fsdp)


def schedules(pipeline: int, layers: int) -> list[tuple[Schedule, int]]:
    """Returns the schedules of a pipeline, with their numbers of chunks."""
    if pipeline == 1:
        return [("1F1B", 1)]
    found: list[tuple[Schedule, int]] = [*(("1F1B", chunks) for chunks in CHUNKS), ("ZBH1", 1), ("ZBV", 2)]
    return [(schedule, chunks) for schedule, chunks in found if pipeline * chunks <= layers]
