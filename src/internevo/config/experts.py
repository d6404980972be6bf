"""The section ``model.moe_layer_kwargs``: options of layers with experts."""

from __future__ import annotations

from typing import Literal

from .option import KERNELS, MAX_SIZE, Section, option


class MoeLayerKwargs(Section):
    """Options of a layer with experts."""

    capacity_factor: float | None = option(
        None,
        "Capacity of an expert in training: the maximum number of tokens that it takes, divided by the number that it would "
        "take if all experts took the same. None: 1.0 for GShard.",
        gt=0,
        needs="model.num_experts",
    )
    eval_capacity_factor: float | None = option(
        None, "The same as capacity_factor, in evaluation and generation.", gt=0, needs="model.num_experts"
    )
    min_capacity: int = option(
        4, "Smallest capacity of an expert.", unit="tokens", ge=0, le=MAX_SIZE, needs="model.num_experts"
    )
    drop_tokens: bool = option(
        True, "Drop tokens beyond an expert's capacity. False: with GShard, no token is dropped.", needs="model.num_experts"
    )
    drop_policy: Literal["position", "probs"] = option(
        "position",
        "Which tokens a full expert drops. position: the last in the batch. probs: those with the smallest probability.",
        needs="model.num_experts",
    )
    bias_update_speed: float | None = option(
        None,
        "Balancing without a loss (https://arxiv.org/abs/2408.15664): each router has a bias per expert, which is added to the "
        "probabilities for the choice of experts only. After each step it moves by this much, up if the expert had less than "
        "the mean load, else down. The paper has 0.001. 0: the biases of a checkpoint stay as they are. None: there are none.",
        ge=0,
        le=1,
        needs="model.num_experts",
    )
    noisy_gate_policy: Literal["Jitter", "RSample"] | None = option(
        None, "Kind of noise in the router.", not_available="noisy routers"
    )
    drop_and_pad: bool = option(
        False, "Pad the tokens of every expert to its capacity.", ignored="experts take different numbers of tokens"
    )
    use_rts: bool = option(True, "Drop random tokens.", ignored="drop_policy decides, so that results do not depend on chance")
    use_fused_gating: bool = option(True, "Use a fused router.", ignored=KERNELS)
    use_grouped_mlp: bool = option(True, "Use grouped matrix products.", ignored=KERNELS)
    enable_fused_permute: bool = option(False, "Use a fused permutation of tokens.", ignored=KERNELS)
    deterministic_mode: bool = option(
        False, "Use deterministic kernels.", ignored="tokens are always gathered without atomic additions"
    )
    parallel_mode: Literal["tensor", "weight"] | None = option(
        None, "InternEvo's axis over which MegaBlocks sharded experts.", ignored="experts are not sharded over that axis"
    )
    token_dispatch_policy: str = option(
        "alltoall", "How tokens are sent to experts on other ranks.", ignored="an all-to-all is used"
    )
