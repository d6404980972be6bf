"""Optimizer, schedules, loss and gradient scaling."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import field_validator

from .option import REQUIRED, Section, dtype_name, option


class Adam(Section):
    """AdamW. Weight decay is on matrices only, not on norms and biases."""

    lr: float = option(REQUIRED, "Peak learning rate.", ge=0)
    adam_beta1: float = option(0.9, "Decay of the first moment.", ge=0, lt=1)
    adam_beta2: float = option(0.95, "Decay of the second moment, unless beta2_scheduler is given.", ge=0, lt=1)
    adam_beta2_c: float = option(0.0, "InternEvo's constant of the beta2 schedule.", ignored="beta2_scheduler.c is read")
    adam_eps: float = option(1e-8, "Added to the root of the second moment.", gt=0)
    weight_decay: float = option(0.01, "Decoupled weight decay.", ge=0)


class LrScheduler(Section):
    """Linear warm-up, then a cosine to eta_min."""

    total_steps: int | None = option(None, "End of the cosine; by default data.total_steps.", unit="steps", ge=1)
    init_steps: int = option(0, "Steps with learning rate 0 before the warm-up.", unit="steps", ge=0)
    warmup_ratio: float = option(0.0, "int(total_steps * warmup_ratio) steps of warm-up.", ge=0, le=1)
    eta_min: float = option(0.0, "Final learning rate.", ge=0)
    last_epoch: int = option(-1, "Start of the schedule.", ignored="the schedule is a function of the step")


class Beta2Scheduler(Section):
    """beta2(step) = max(init_beta2, 1 - step ** -c); constant when c <= 0."""

    init_beta2: float = option(0.95, "Smallest beta2.", ge=0, lt=1)
    c: float = option(0.0, "Exponent; <= 0: constant.")
    cur_iter: int = option(-1, "Start of the schedule.", ignored="the schedule is a function of the step")


class Fp16Scaler(Section):
    """Start and growth of the loss scale."""

    initial_scale: float = option(2.0**16, "First loss scale.", gt=0)
    min_scale: float | None = option(None, "Smallest loss scale.", gt=0)
    growth_interval: int = option(1000, "Clean steps before the scale grows.", unit="steps", ge=1)


class GradScaler(Section):
    """Dynamic loss scale for fp16 (fp32 and bf16 need none and use 1)."""

    fp16: Fp16Scaler = option(Fp16Scaler(), "Start and growth.")
    growth_factor: float = option(2.0, "Growth of the scale.", gt=1)
    backoff_factor: float = option(0.5, "Shrinking of the scale.", gt=0, lt=1)
    max_scale: float | None = option(None, "Largest loss scale.", gt=0)
    hysteresis: int = option(2, "Overflows in a row before the scale shrinks.", ge=0)


class HybridZeroOptimizer(Section):
    """Gradient clipping, and how the data axis communicates."""

    clip_grad_norm: float = option(0.0, "Largest global L2 norm of the gradients; 0: no clipping.", ge=0)
    overlap_sync_grad: bool = option(
        True, "Reduce gradients while backward goes on (over gloo: in ZeRO-1.5 without replicas, with grad_dtype float32)."
    )
    overlap_sync_param: bool = option(True, "Gather the next layer's parameters while this one computes.")
    reduce_bucket_size: int | None = option(
        None,
        "ZeRO-1.5 reduces and gathers consecutive layers at once, up to so many elements together; None: each layer by itself.",
        ge=1,
    )
    use_split_tensor_optim: bool = option(False, "Cut tensors between ranks.", ignored="tensors are always cut")
    all_gather_size: int = option(512 * 1024**2, "Elements per gather.", ignored="reduce_bucket_size is read")
    grad_dtype: Literal["float32", "bfloat16", "float16"] = option(
        "float32", "Type in which gradients are accumulated over micro-batches and reduced over ranks."
    )

    @field_validator("grad_dtype", mode="before")
    @classmethod
    def _dtype(cls, value: Any) -> Any:
        return dtype_name(value)


class Loss(Section):
    """Cross-entropy of the next token."""

    label_smoothing: float = option(0.0, "Weight of the uniform distribution in the target.", ge=0, lt=1)
    op_type: str = option("py_vocab_parallel", "Kernel of the loss.", ignored="one loss serves all: linear and chunked")
    moe_loss_coeff: float = option(1.0, "Weight of the experts' load-balancing loss.", ge=0)
    moe_loss_kind: Literal["gshard", "pooled"] = option(
        "gshard",
        "gshard: of each layer, by first choices, summed over layers (InternEvo). "
        "pooled: all choices of all layers as one (Hugging Face's router_aux_loss_coef).",
    )
    moe_z_loss_coeff: float = option(0.0, "Weight of the router's z-loss, summed over layers.", ge=0)
    mtp_loss_coeff: float = option(0.0, "Weight of multi-token prediction.", later="multi-token prediction")
