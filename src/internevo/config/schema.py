"""The whole config. Its values are checked and cannot be changed; each part of the program gets only its section."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from .data import Data
from .model import Model
from .option import REQUIRED, PathText, Section, option
from .parallel import Parallel
from .run import Ckpt, Generation, Monitor
from .training import Adam, Beta2Scheduler, GradScaler, HybridZeroOptimizer, Loss, LrScheduler, Muon

FP32_NORM = "norms always compute in fp32, and their master weights are fp32"
FP32_LOSS = "the loss is always computed in fp32"


class Config(Section):
    """The config of a training run."""

    JOB_NAME: PathText = option(
        "AnonymousJob", "Name of the run. Its folder is runs/JOB_NAME, unless ckpt.save_ckpt_folder is set."
    )
    model_type: str = option("INTERNLM2", "Family of the model; the page on models lists all families.")
    seed: int = option(1024, "Seed of the initial weights; data.seed is the seed of the order of the data.", ge=0)
    model: Model = option(REQUIRED, "The shape of the network, its precision and its initial weights.")
    data: Data = option(REQUIRED, "The datasets and the batch size.")
    parallel: Parallel = option(Parallel(), "The sizes and strategies of all axes.")
    adam: Adam = option(REQUIRED, "The optimizer, AdamW.")
    muon: Muon | None = option(None, "Update the matrices of the layers with Muon (muon = dict()). None: with AdamW.")
    lr_scheduler: LrScheduler = option(LrScheduler(), "The schedule of the learning rate.")
    beta2_scheduler: Beta2Scheduler | None = option(None, "The schedule of Adam's beta2. None: always adam.adam_beta2.")
    hybrid_zero_optimizer: HybridZeroOptimizer = option(
        HybridZeroOptimizer(), "Clipping of gradients, and communication of the data axis."
    )
    grad_scaler: GradScaler = option(GradScaler(), "The loss scale for fp16.")
    loss: Loss = option(Loss(), "The terms of the loss.")
    ckpt: Ckpt = option(Ckpt(), "Saving and loading of checkpoints.")
    monitor: Monitor = option(Monitor(), "What is measured, logged and checked during training.")
    generation: Generation = option(Generation(), "InternEvo's options for text generation.")
    enable_tb: bool = option(True, "Write TensorBoard files to the run folder.")
    deterministic: bool = option(
        False,
        "On GPUs, compute the same bits whenever a run is repeated or resumed on the same cards with the same layout "
        "(torch.use_deterministic_algorithms). It is slower. CPUs always do.",
    )
    cudnn_deterministic: bool = option(False, "Value of torch.backends.cudnn.deterministic.")
    cudnn_benchmark: bool = option(False, "Value of torch.backends.cudnn.benchmark.")

    tensorboard_folder: str | None = option(
        None, "Folder of the TensorBoard files.", ignored="it is tensorboard/ in the run folder"
    )
    resume_tb_folder: str | None = option(
        None, "TensorBoard folder to continue.", ignored="a resumed run continues the one in its run folder"
    )
    tensorboard: dict[str, Any] | None = option(
        None, "Options of the TensorBoard files.", ignored="monitor.tensorboard is used"
    )
    use_fp32_norm: bool = option(False, "Keep the weights of norms in fp32.", ignored=FP32_NORM)
    use_fp32_logits: bool = option(False, "Compute the logits in fp32.", ignored=FP32_LOSS)
    metric_dtype: str | None = option(None, "Dtype of the metrics.", ignored="metrics are always summed in fp32")
    output_tf32: bool = option(False, "Convert the output of the head to fp32.", ignored=FP32_LOSS)
    use_apex_adam: bool = option(False, "Use the Adam of Apex.", ignored="PyTorch's fused AdamW is used")
    gradient_handler: list[Any] = option([], "Additional gradient handlers.", not_available="gradient handlers")
    cpu_offloading: dict[str, Any] | None = option(
        None,
        "Keep activations in the host's memory until the backward pass.",
        not_available="activation offload",
        supported=({"enable": False, "num_layers": 0}, {"enable": False}),
    )
    selective_checkpoint: bool = option(
        False,
        "In layers that are recomputed (model.checkpoint), keep the outputs of the attention kernel, so that it runs once.",
        needs="model.checkpoint",
    )
    selective_checkpoint_offload: bool = option(
        False, "Keep these outputs in the host's memory.", not_available="activation offload"
    )
    fp8: dict[str, Any] | None = option(None, "Compute matrix products in fp8.", not_available="fp8")
    int8_training: bool | None = option(None, "Compute matrix products in int8.", not_available="int8", supported=(False,))
    int8_mode: str | None = option(None, "Kind of int8 training.", ignored="it is an option of int8_training")
    hf: dict[str, Any] | None = option(
        None, "Use a module of Hugging Face's transformers as the model.", not_available="models of transformers"
    )
    fsdp_wrap_cls: list[Any] = option([], "Classes of modules that FSDP wraps.", ignored="each decoder layer is wrapped")
    pad_token_id: int | None = option(None, "Id of the padding token.", ignored="padding never enters the loss")
    grad_profiling: dict[str, Any] | None = option(
        None, "Log gradient norms of each layer.", not_available="gradient profiling"
    )
    launcher: Literal["torch", "slurm"] | None = option(
        None, "What has started the processes.", ignored="it is detected from the environment"
    )

    @property
    def run_folder(self) -> Path:
        """The folder of everything that the run writes."""
        return Path(self.ckpt.save_ckpt_folder or f"runs/{self.JOB_NAME}")
