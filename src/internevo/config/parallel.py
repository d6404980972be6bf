"""The ``parallel`` section: how the run is spread over processes."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import field_validator

from .option import Section, option

OVERLAP = "a setting of speed that never changes results, and this version has one way"


class Zero1(Section):
    """The data axis: sharding of optimizer state (ZeRO-1.5), or of everything (FSDP)."""

    size: int = option(-1, "Ranks that share one copy of the optimizer state; <= 0: all data ranks; 1: none share.")
    fsdp: bool = option(False, "Shard parameters and gradients too, gathered per use (FSDP).")


class Tensor(Section):
    """The tensor axis."""

    size: int = option(1, "Ranks that share one sample.", ge=1)
    mode: Literal["mtp", "msp", "fsp", "isp"] = option("mtp", "Strategy of the tensor axis.")


class Weight(Section):
    """Weight sharding of Intern Sequence Parallel."""

    size: int = option(1, "Ranks that share one copy of each weight (isp).", ge=1)
    overlap: bool = option(False, "Gather the next weights while computing.")
    forward_overlap_per: Literal["layer", "module"] = option("layer", "Unit of the prefetch.")
    launch_allgather_before: Literal["wqkv", "attn", "wo", "w1"] = option("wo", "Where the next gather starts.")
    layer_fuse_isp_comm: bool = option(False, "One gather per layer.", ignored=OVERLAP)
    early_reduce_scatter_release: bool = option(True, "Free gradient buffers early.", ignored=OVERLAP)
    memory_pool: bool = option(False, "Reuse gather buffers.", ignored="the allocator keeps them")


class Pipeline(Section):
    """The pipeline axis."""

    size: int = option(1, "Pipeline stages.", later="pipeline parallelism", ge=1)
    mode: Literal["1F1B", "ZBH1", "ZBV"] = option("1F1B", "Schedule.")
    interleaved_overlap: bool = option(False, "Overlap communication of interleaved stages.")
    use_zeropp: bool = option(False, "A fork's schedule.", later="ZeroPP schedules")
    decouple_grad: bool = option(False, "A fork's schedule.", later="ZeroPP schedules")

    @field_validator("mode", mode="before")
    @classmethod
    def _any_case(cls, value: Any) -> Any:
        return value.upper() if isinstance(value, str) else value


class Expert(Section):
    """The expert axis, taken from the data ranks."""

    size: int = option(-1, "Ranks that share the experts; <= 0: min(data ranks, experts).", later="experts", neutral=(0, 1))
    no_tp: bool = option(False, "Experts are not cut by the tensor axis.", later="experts")


class Sequence2D(Section):
    """InternEvo's two-dimensional sequence parallelism."""

    enable: bool = option(False, "Switch it on.", later="2D sequence parallelism")
    head_size: int = option(1, "Ranks over heads.")
    context_size: int = option(1, "Ranks over the context.")
    window_size: int = option(1, "Ranks of a window.")
    device_placement_strategy: dict[str, bool] = option({}, "Order of ranks.")


class Fsdp(Section):
    """InternEvo's newer switch for FSDP; the same as ``parallel.zero1.fsdp``."""

    enable: bool = option(False, "As parallel.zero1.fsdp = True.")
    mode: Literal["v1", "v2"] = option("v1", "PyTorch's FSDP version.", ignored="fully_shard (v2) is used")
    init_method: Literal["cuda", "meta"] = option("cuda", "Where weights are made.", ignored="always without a full copy")


class Parallel(Section):
    """Sizes and modes of every axis."""

    zero1: Zero1 = option(Zero1(), "Data axis: ZeRO-1.5 or FSDP.")
    fsdp: Fsdp = option(Fsdp(), "FSDP by its newer name.")
    tensor: Tensor = option(Tensor(), "Tensor axis.")
    weight: Weight = option(Weight(), "Weight sharding (isp).")
    pipeline: Pipeline = option(Pipeline(), "Pipeline axis.")
    expert: Expert = option(Expert(), "Expert axis.")
    expert_weight: Weight = option(Weight(), "Weight sharding of experts (isp).")
    expert_zero1: Zero1 = option(Zero1(), "ZeRO of experts.")
    sequence_2D: Sequence2D = option(Sequence2D(), "2D sequence parallelism.")
    sequence_parallel: bool | None = option(None, "Old switch.", ignored="parallel.tensor.mode says it")
