"""The sections of the optimizer, its schedules, the loss scale and the loss."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import field_validator

from .option import REQUIRED, Section, dtype_name, option

WSD = "lr_scheduler.kind='wsd'"


class Adam(Section):
    """The optimizer, AdamW. Weight decay applies to matrices, not to norms and biases."""

    lr: float = option(REQUIRED, "Highest learning rate, which is reached at the end of the warm-up.", ge=0)
    adam_beta1: float = option(0.9, "Decay rate of the first moment.", ge=0, lt=1)
    adam_beta2: float = option(0.95, "Decay rate of the second moment, if there is no beta2_scheduler.", ge=0, lt=1)
    adam_beta2_c: float = option(0.0, "Constant of the schedule of beta2.", ignored="beta2_scheduler.c is used")
    adam_eps: float = option(1e-8, "Number that is added to the square root of the second moment.", ge=1e-37)
    weight_decay: float = option(0.01, "Weight decay. It is decoupled from the gradient.", ge=0)


class Muon(Section):
    """Muon: the update of a matrix is its momentum, made orthogonal. The matrices of the layers are updated so, of experts
    one by one; embedding, head, routers, norms and biases with AdamW."""

    momentum: float = option(0.95, "Decay rate of the momentum.", ge=0, lt=1)
    nesterov: bool = option(True, "Add the new gradient to the momentum once more, as Nesterov's does.")
    steps: int = option(5, "Number of Newton-Schulz iterations.", ge=1, le=100)
    scale: Literal["match_rms_adamw", "original"] = option(
        "match_rms_adamw",
        "What the learning rate of a matrix is multiplied by. match_rms_adamw: 0.2 * sqrt(max(rows, columns)), so that adam.lr "
        "and adam.weight_decay fit both. original: sqrt(max(1, rows / columns)).",
    )
    lr: float | None = option(None, "Highest learning rate of the matrices; it follows the same schedule. None: adam.lr.", ge=0)


class LrScheduler(Section):
    """The schedule of the learning rate: linear warm-up to adam.lr, then as `kind` says, to eta_min."""

    kind: Literal["cosine", "linear", "constant", "wsd"] = option(
        "cosine",
        "What comes after the warm-up. cosine, linear: the learning rate falls along a cosine or a straight line until "
        "total_steps. constant: it stays at adam.lr. wsd (warmup-stable-decay): it stays there, and falls in the last steps.",
    )
    total_steps: int | None = option(
        None, "Step at which the learning rate reaches eta_min. None: data.total_steps.", unit="steps", ge=1
    )
    init_steps: int = option(0, "Number of steps with learning rate 0 before the warm-up.", unit="steps", ge=0)
    warmup_ratio: float = option(
        0.0,
        "Length of the warm-up: int(total_steps * warmup_ratio) steps, in which the learning rate rises.",
        ge=0,
        le=1,
        unless="lr_scheduler.warmup_steps",
    )
    warmup_steps: int | None = option(
        None,
        "Length of the warm-up, which then does not depend on total_steps. None: as warmup_ratio says.",
        unit="steps",
        ge=0,
    )
    decay_ratio: float = option(
        0.1,
        "Length of the decay of wsd: the last int(total_steps * decay_ratio) steps.",
        ge=0,
        le=1,
        needs=WSD,
        unless="lr_scheduler.decay_steps",
    )
    decay_steps: int | None = option(
        None, "Length of the decay of wsd. None: as decay_ratio says.", unit="steps", ge=0, needs=WSD
    )
    decay_type: Literal["linear", "1-sqrt", "cosine"] = option(
        "linear",
        "Along what the learning rate falls in the decay of wsd: a straight line, 1 - sqrt (fast at first), or a cosine.",
        needs=WSD,
    )
    eta_min: float = option(0.0, "Final learning rate, unless kind is constant.", ge=0)
    last_epoch: int = option(-1, "Step at which the schedule starts.", ignored="the schedule is a function of the step")

    def warmup(self, total: int) -> int:
        """Returns the number of steps of the warm-up, if the schedule ends after ``total`` steps."""
        return int(total * self.warmup_ratio) if self.warmup_steps is None else self.warmup_steps

    def decay(self, total: int) -> int:
        """Returns the number of steps of the decay of wsd, if the schedule ends after ``total`` steps; 0 for other kinds."""
        if self.kind != "wsd":
            return 0
        return int(total * self.decay_ratio) if self.decay_steps is None else self.decay_steps


class Beta2Scheduler(Section):
    """The schedule of Adam's beta2: max(init_beta2, 1 - step ** -c), or always init_beta2 if c <= 0."""

    init_beta2: float = option(0.95, "Smallest value of beta2.", ge=0, lt=1)
    c: float = option(0.0, "Exponent of the schedule. 0 or less: beta2 is always init_beta2.")
    cur_iter: int = option(-1, "Step at which the schedule starts.", ignored="the schedule is a function of the step")


class Fp16Scaler(Section):
    """The initial value and the growth of the loss scale."""

    initial_scale: float = option(2.0**16, "Initial loss scale.", gt=0)
    min_scale: float | None = option(None, "Smallest loss scale. None: no limit.", gt=0)
    growth_interval: int = option(
        1000, "Number of steps without overflow after which the loss scale grows.", unit="steps", ge=1
    )


class GradScaler(Section):
    """The dynamic loss scale for fp16. (fp32 and bf16 do not need one; their scale is 1.)"""

    fp16: Fp16Scaler = option(Fp16Scaler(), "The initial value and the growth of the loss scale.")
    growth_factor: float = option(2.0, "Number by which the loss scale is multiplied when it grows.", gt=1)
    backoff_factor: float = option(0.5, "Number by which the loss scale is multiplied when it shrinks.", gt=0, lt=1)
    max_scale: float | None = option(None, "Largest loss scale. None: no limit.", gt=0)
    hysteresis: int = option(2, "Number of overflows in a row after which the loss scale shrinks.", ge=0)


class HybridZeroOptimizer(Section):
    """Clipping of gradients, and communication of the data axis."""

    clip_grad_norm: float = option(
        0.0, "Largest global L2 norm of the gradients; larger gradients are scaled down to it. 0: no clipping.", ge=0
    )
    overlap_sync_grad: bool = option(
        True,
        "Reduce gradients while the backward pass continues. With gloo this works only for ZeRO-1.5 without replicas and with "
        "grad_dtype float32.",
    )
    overlap_sync_param: bool = option(True, "Gather the parameters of the next layer while the current layer computes.")
    reduce_bucket_size: int | None = option(
        None,
        "ZeRO-1.5 gathers and reduces consecutive layers together, up to this number of elements. None: each layer alone.",
        ge=1,
    )
    use_split_tensor_optim: bool = option(False, "Shard single tensors over the ranks.", ignored="tensors are always sharded")
    all_gather_size: int = option(
        512 * 1024**2, "Number of elements that are gathered together.", ignored="reduce_bucket_size is used"
    )
    grad_dtype: Literal["float32", "bfloat16", "float16"] = option(
        "float32", "Dtype in which gradients are accumulated over micro-batches and reduced over ranks."
    )

    @field_validator("grad_dtype", mode="before")
    @classmethod
    def _dtype(cls, value: Any) -> Any:
        return dtype_name(value)


class Loss(Section):
    """The loss: cross-entropy of the next token, and with experts the losses of the routers."""

    label_smoothing: float = option(
        0.0, "Label smoothing: the weight of the uniform distribution in the target of the cross-entropy.", ge=0, lt=1
    )
    op_type: str = option(
        "py_vocab_parallel", "Kernel of the loss.", ignored="there is one kernel, which computes head and loss in chunks"
    )
    moe_loss_coeff: float = option(1.0, "Weight of the load-balancing loss of the experts.", ge=0, needs="model.num_experts")
    moe_loss_kind: Literal["gshard", "pooled"] = option(
        "gshard",
        "How the load-balancing loss is computed. gshard: for each layer, from the first choice of each token, and summed over "
        "layers (InternEvo). pooled: once, from all choices in all layers (Hugging Face's router_aux_loss_coef).",
        needs="model.num_experts",
    )
    moe_z_loss_coeff: float = option(
        0.0, "Weight of the z-loss of the routers, which is summed over layers.", ge=0, needs="model.num_experts"
    )
    mtp_loss_coeff: float = option(
        0.0, "Weight of the loss of multi-token prediction.", not_available="multi-token prediction", ge=0
    )
