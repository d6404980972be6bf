"""The ``parallel`` section: the layout, or how a run is divided among its processes."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import field_validator

from .option import MAX_SIZE, Section, option

AHEAD = "the experts of the next layer are always gathered while those of this layer are used"
FSDP = "parallel.zero1.fsdp decides, also for experts"
SEQUENCE_2D = "parallel.sequence_2D.enable"
RING = "no keys and values go around a ring"
OVERLAP = "it would change only the speed, and this version always communicates in the same way"


class Zero1(Section):
    """What the data axis shards: the optimizer state (ZeRO-1.5), or parameters and gradients too (FSDP)."""

    size: int = option(
        -1, "Number of ranks over which the optimizer state is sharded. 0 or less: all data ranks. 1: it is not sharded."
    )
    fsdp: bool = option(
        False, "Shard parameters and gradients too (FSDP). Each layer's parameters are gathered whenever they are used."
    )


class Tensor(Section):
    """The tensor axis: ranks that work on the same rows."""

    size: int = option(1, "Number of ranks that work on the same rows.", ge=1)
    mode: Literal["mtp", "msp", "fsp", "isp"] = option(
        "mtp",
        "Strategy of the tensor axis. mtp: tensor parallelism. msp: mtp, with the residual stream sharded along the sequence. "
        "fsp: msp, with fewer activations kept. isp: Intern Sequence Parallel.",
    )


class Weight(Section):
    """The weight axis of Intern Sequence Parallel (isp)."""

    size: int = option(1, "Number of ranks over which each weight is sharded (isp).", ge=1)
    overlap: bool = option(False, "Gather the next weights while the current ones are used.")
    forward_overlap_per: Literal["layer", "module"] = option(
        "layer",
        "What is gathered in advance in the forward pass. module: the weights of the next linear layers. layer: all weights of "
        "the next decoder layer.",
    )
    launch_allgather_before: Literal["wqkv", "attn", "wo", "w1"] = option(
        "wo", 'With forward_overlap_per = "layer": the part of a layer before which the gather for the next layer starts.'
    )
    layer_fuse_isp_comm: bool = option(False, "Gather all weights of a layer with one collective.", ignored=OVERLAP)
    early_reduce_scatter_release: bool = option(True, "Free the buffers of gradients early.", ignored=OVERLAP)
    memory_pool: bool = option(
        False, "Use the buffers of gathered weights again.", ignored="PyTorch's allocator uses their memory again"
    )


class Pipeline(Section):
    """The pipeline axis: ranks that each compute some of the layers."""

    size: int = option(1, "Number of ranks that the layers are divided among. 1: no pipeline.", ge=1)
    mode: Literal["1F1B", "ZBH1", "ZBV"] = option(
        "1F1B",
        "Schedule of the micro-batches. 1F1B: one forward, one backward, with model.num_chunks > 1 interleaved. ZBH1, ZBV: "
        "zero-bubble schedules, which compute the gradients of weights later.",
    )
    interleaved_overlap: bool = option(
        False, "Overlap the messages of interleaved stages with computation.", ignored="they always overlap"
    )
    layers: list[int] = option(
        [],
        "Number of layers of each stage, in the order in which a micro-batch goes through them; there are size * "
        "model.num_chunks stages. Empty: they are divided by cost.",
    )
    use_zeropp: bool = option(False, "Use ZeroPP, the schedule of a fork of InternEvo.", not_available="ZeroPP schedules")
    decouple_grad: bool = option(
        False, "Compute the gradients of weights and of activations apart.", not_available="ZeroPP schedules"
    )

    @field_validator("mode", mode="before")
    @classmethod
    def _any_case(cls, value: Any) -> Any:
        return value.upper() if isinstance(value, str) else value


class Expert(Section):
    """The expert axis: ranks that divide the experts among themselves."""

    size: int = option(
        -1,
        "Number of ranks that the experts are divided among; it divides the number of experts and that of the ranks with the "
        "same shard of an expert. 0 or less: the largest possible.",
        ge=-(2**31),
        le=MAX_SIZE,
    )
    no_tp: bool = option(
        False,
        "Do not shard experts over the tensor axis (mtp, msp, fsp): each rank has whole experts, for its part of the tokens.",
    )


class ExpertWeight(Section):
    """The weight axis of experts in isp."""

    size: int = option(
        1, "Number of ranks over which each weight of an expert is sharded (isp).", ge=1, needs="model.num_experts"
    )
    overlap: bool = option(
        False,
        "Gather the experts of the next layer that has experts while those of one layer are used.",
        needs="parallel.expert_weight.size",
    )
    forward_overlap_per: Literal["layer", "module"] = option(
        "layer", "The same as parallel.weight.forward_overlap_per, for experts.", ignored=AHEAD
    )
    launch_allgather_before: Literal["wqkv", "attn", "wo", "w1"] = option(
        "wo", "The same as parallel.weight.launch_allgather_before, for experts.", ignored=AHEAD
    )
    layer_fuse_isp_comm: bool = option(
        False,
        "The same as parallel.weight.layer_fuse_isp_comm, for experts.",
        ignored="all weights of a layer's experts are always gathered with one collective",
    )
    early_reduce_scatter_release: bool = option(True, "Free the buffers of gradients early.", ignored=OVERLAP)
    memory_pool: bool = option(
        False, "Use the buffers of gathered weights again.", ignored="PyTorch's allocator uses their memory again"
    )


class ExpertZero1(Section):
    """The data axis of experts."""

    size: int = option(
        -1,
        "Ranks over which the optimizer state of experts is sharded. 0 or less: all ranks that have the same experts, "
        "or fewer if parallel.zero1.size is smaller.",
        ge=-(2**31),
        le=MAX_SIZE,
        needs="model.num_experts",
    )
    fsdp: bool = option(False, "Shard parameters and gradients of experts too (FSDP).", ignored=FSDP)


class Placement(Section):
    """Which ranks of a tensor group are neighbours."""

    head_first: bool = option(
        True, "The ranks that share the heads are neighbours. False: those that share the queries are.", needs=SEQUENCE_2D
    )
    interleaved: bool = option(False, "Order of the ranks in a ring.", ignored=RING)


class Sequence2D(Section):
    """2D sequence parallelism, for more ranks than there are heads: in attention, the ranks of the tensor axis share heads and
    queries."""

    enable: bool = option(False, "Use 2D sequence parallelism. It needs parallel.tensor.mode = 'isp'.")
    head_size: int = option(1, "Ranks that share the heads.", needs=SEQUENCE_2D, ge=1, le=MAX_SIZE)
    context_size: int = option(
        1,
        "Ranks that share the queries: each has all keys and values of its heads. head_size * context_size is "
        "parallel.tensor.size.",
        needs=SEQUENCE_2D,
        ge=1,
        le=MAX_SIZE,
    )
    window_size: int = option(1, "Number of ranks in an inner ring.", ignored=RING, ge=1)
    device_placement_strategy: Placement = option(Placement(), "Order of the ranks.")


class Fsdp(Section):
    """InternEvo's newer keys for FSDP; the same as ``parallel.zero1.fsdp``."""

    enable: bool = option(False, "Use FSDP; the same as parallel.zero1.fsdp.")
    mode: Literal["v1", "v2"] = option("v1", "Version of PyTorch's FSDP.", ignored="fully_shard (v2) is always used")
    init_method: Literal["cuda", "meta"] = option(
        "cuda", "Device on which the weights are created.", ignored="no rank ever creates a full copy of the weights"
    )


class Parallel(Section):
    """The sizes and strategies of all axes."""

    zero1: Zero1 = option(Zero1(), "The data axis: ZeRO-1.5 or FSDP.")
    fsdp: Fsdp = option(Fsdp(), "FSDP, under its newer name.")
    tensor: Tensor = option(Tensor(), "The tensor axis.")
    weight: Weight = option(Weight(), "The weight axis (isp).")
    pipeline: Pipeline = option(Pipeline(), "The pipeline axis.")
    expert: Expert = option(Expert(), "The expert axis.")
    expert_weight: ExpertWeight = option(ExpertWeight(), "The weight axis of experts (isp).")
    expert_zero1: ExpertZero1 = option(ExpertZero1(), "The data axis of experts.")
    sequence_2D: Sequence2D = option(Sequence2D(), "2D sequence parallelism.")  # noqa: N815 (InternEvo's name)
    sequence_parallel: bool | None = option(
        None, "InternEvo's older switch for sequence parallelism.", ignored="parallel.tensor.mode decides"
    )
