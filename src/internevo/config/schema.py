"""The whole config: one frozen, validated value. Each part of the program gets only its section of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from .data import Data
from .model import Model
from .option import REQUIRED, Section, option
from .parallel import Parallel
from .run import Ckpt, Generation, Monitor
from .training import Adam, Beta2Scheduler, GradScaler, HybridZeroOptimizer, Loss, LrScheduler

FP32_NORM = "norms compute in fp32 from fp32 master weights in any case"


class Config(Section):
    """A training run."""

    JOB_NAME: str = option(
        "AnonymousJob", "Name of the run; its folder is runs/JOB_NAME unless ckpt.save_ckpt_folder says else."
    )
    model_type: str = option("INTERNLM2", "Family of the model (the page on models lists them).")
    seed: int = option(1024, "Seed of the initial weights.")
    model: Model = option(REQUIRED, "The network.")
    data: Data = option(REQUIRED, "The data and the batch.")
    parallel: Parallel = option(Parallel(), "The layout.")
    adam: Adam = option(REQUIRED, "The optimizer.")
    lr_scheduler: LrScheduler = option(LrScheduler(), "The learning rate over time.")
    beta2_scheduler: Beta2Scheduler | None = option(None, "Adam's beta2 over time; by default adam.adam_beta2.")
    hybrid_zero_optimizer: HybridZeroOptimizer = option(HybridZeroOptimizer(), "Clipping and communication.")
    grad_scaler: GradScaler = option(GradScaler(), "Loss scale of fp16.")
    loss: Loss = option(Loss(), "The loss.")
    ckpt: Ckpt = option(Ckpt(), "Checkpoints.")
    monitor: Monitor = option(Monitor(), "Monitoring.")
    generation: Generation = option(Generation(), "Generation.")
    enable_tb: bool = option(True, "Write TensorBoard files to the run folder.")
    cudnn_deterministic: bool = option(False, "torch.backends.cudnn.deterministic.")
    cudnn_benchmark: bool = option(False, "torch.backends.cudnn.benchmark.")

    tensorboard_folder: str | None = option(None, "Folder of TensorBoard.", ignored="it is tensorboard/ in the run folder")
    resume_tb_folder: str | None = option(None, "Folder to continue.", ignored="a resumed run goes on in its run folder")
    tensorboard: dict[str, Any] | None = option(None, "Queue length.", ignored="monitor.tensorboard is read")
    use_fp32_norm: bool = option(False, "Norm weights in fp32.", ignored=FP32_NORM)
    use_fp32_logits: bool = option(False, "Logits in fp32.", ignored="the loss is computed in fp32 in any case")
    metric_dtype: str | None = option(None, "Type of metrics.", ignored="metrics are summed in fp32 in any case")
    output_tf32: bool = option(False, "Head output in fp32.", ignored="the loss is computed in fp32 in any case")
    use_apex_adam: bool = option(False, "Apex's Adam.", ignored="PyTorch's fused AdamW is used")
    gradient_handler: list[Any] = option([], "Extra gradient handlers.", later="gradient handlers")
    cpu_offloading: dict[str, Any] | None = option(
        None,
        "Activations to the host.",
        later="activation offload",
        neutral=({"enable": False, "num_layers": 0}, {"enable": False}),
    )
    selective_checkpoint: bool = option(
        False, "What is recomputed (model.checkpoint) keeps the outputs of its attention kernel."
    )
    selective_checkpoint_offload: bool = option(False, "Those to the host.", later="activation offload")
    fp8: dict[str, Any] | None = option(None, "fp8 matrix products.", later="fp8")
    int8_training: bool | None = option(None, "int8 matrix products.", later="int8", neutral=(False,))
    int8_mode: str | None = option(None, "Kind of int8.", ignored="it belongs to int8_training")
    hf: dict[str, Any] | None = option(None, "A Hugging Face module as the model.", later="foreign models")
    fsdp_wrap_cls: list[Any] = option([], "Classes that FSDP wraps.", ignored="each decoder layer is wrapped")
    pad_token_id: int | None = option(None, "Padding token.", ignored="padding has no label")
    grad_profiling: dict[str, Any] | None = option(None, "Gradient norms per layer.", later="gradient profiling")
    launcher: Literal["torch", "slurm"] | None = option(None, "Who started it.", ignored="it is read from the environment")

    @property
    def run_folder(self) -> Path:
        """Where everything that the run writes is."""
        return Path(self.ckpt.save_ckpt_folder or f"runs/{self.JOB_NAME}")
