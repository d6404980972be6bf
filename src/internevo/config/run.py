"""The sections ``ckpt``, ``monitor`` and ``generation``."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import field_validator

from .option import MAX_SIZE, PathText, Section, listed, option

COMMAND = "`internevo generate` has its options on the command line"
LOADING = "load_ckpt_info says what is loaded"
UPLOAD = "checkpoints are always written in the background"
MAY_DIFFER = (
    "model_type", "rope_base", "rope_scaling", "max_position_embeddings", "layer_norm_epsilon", "sliding_window", "use_alibi",
    "norm_head", "add_unit_offset", "use_swiglu", "top_k", "norm_topk_prob",
)  # fmt: skip
"""Keys of ``model`` that do not change the names and shapes of the weights, and ``model_type``."""
CONTENTS = ("model", "optimizer", "scheduler", "sampler", "all")


class LoadCkptInfo(Section):
    """The checkpoint that a new run starts from."""

    path: PathText | None = option(
        None,
        'Checkpoint, run folder or Hugging Face folder to load; or with ckpt_type="hf" the name of a model on the Hugging '
        "Face Hub (owner/name). None: start with new initial weights.",
    )
    content: tuple[str, ...] = option(
        ("all",),
        "Parts of the checkpoint to load: some of model, optimizer, scheduler and sampler (the position in the data), or all.",
    )
    ckpt_type: Literal["internevo", "internlm", "hf", "llama", "hf_llama", "hf_model", "LLAMA", "normal"] = option(
        "internevo", 'Format of the checkpoint: "internevo" (this program\'s) or "hf" (Hugging Face\'s).'
    )

    adapter: PathText | None = option(
        None,
        "Folder of the peft library (adapter_config.json) from which the adapters of model.lora start; path has the weights.",
    )
    may_differ: tuple[str, ...] = option(
        (),
        "Keys of model (and model_type) in which the config may differ from the model that is loaded, for example rope_base. "
        "Every other difference is an error. Possible: " + ", ".join(MAY_DIFFER) + ".",
    )

    @field_validator("may_differ")
    @classmethod
    def _keys(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        names = tuple(name.removeprefix("model.") for name in value)
        unknown = [name for name in names if name not in MAY_DIFFER]
        if unknown:
            raise ValueError(f"{unknown[0]!r} is not one of {', '.join(MAY_DIFFER)}")
        return names

    @field_validator("content", mode="before")
    @classmethod
    def _contents(cls, value: Any) -> Any:
        names = tuple(name.lower() if isinstance(name, str) else name for name in listed(value))
        unknown = [name for name in names if name not in CONTENTS]
        if unknown or not names:
            raise ValueError(f"must be some of {', '.join(CONTENTS)}, not {', '.join(map(repr, unknown)) or 'none'}")
        return names

    def has(self, part: str) -> bool:
        """Whether ``part`` (model, optimizer, scheduler or sampler) is loaded."""
        return part in self.content or "all" in self.content

    @property
    def is_hf(self) -> bool:
        """Whether it is a model in Hugging Face's format."""
        return self.ckpt_type.startswith("hf")


class Ckpt(Section):
    """Saving and loading of checkpoints. Everything that a run writes is in ``save_ckpt_folder``."""

    enable_save_ckpt: bool = option(True, "Save checkpoints.")
    save_ckpt_folder: PathText | None = option(None, "The run folder. None: runs/JOB_NAME.")
    checkpoint_every: int = option(
        0, "Number of steps between checkpoints. The last step always has one. 0: only the last step.", unit="steps", ge=0
    )
    keep_last: int | None = option(None, "Number of newest checkpoints to keep; older ones are deleted. None: keep all.", ge=1)
    keep_every: int | None = option(
        None,
        "With keep_last: also keep checkpoints whose step is a multiple of this.",
        unit="steps",
        ge=1,
        needs="ckpt.keep_last",
    )
    oss_snapshot_freq: int = option(
        0, "Number of steps between snapshots, which are written to two folders in turn. 0: no snapshots.", unit="steps", ge=0
    )
    auto_resume: bool = option(
        True,
        "Resume from the newest complete checkpoint or snapshot in the run folder, if any. False: start a new run, which needs "
        "a run folder without checkpoints.",
    )
    load_ckpt_info: LoadCkptInfo | None = option(
        None, "The checkpoint that a new run starts from. None: the weights of model.from_hf, or else new initial weights."
    )
    enable_internevo2hf_ckpt: bool = option(
        False, "Also export the model of each checkpoint in Hugging Face's format, to hf/step-N in the run folder."
    )
    stop_file_path: PathText | None = option(
        None,
        'A file that is read at each step. "N" in it: save and stop at step N. "-N": save at step N and continue. At the start '
        '"0" is written to it; a file that contains anything but a number is refused.',
    )
    load_ckpt_folder: str | dict[str, Any] | None = option(
        None, "InternEvo's older name for load_ckpt_info, or for its path.", ignored=LOADING
    )
    load_model_only_folder: str | None = option(
        None, 'InternEvo\'s older name for load_ckpt_info with content=("model",).', ignored=LOADING
    )
    load_optimizer: bool = option(True, "With load_ckpt_folder: load the optimizer too.", ignored=LOADING)
    snapshot_ckpt_folder: str | None = option(None, "Folder of the snapshots.", ignored="they are in the run folder")
    async_upload: bool = option(False, "Upload checkpoints in the background.", ignored=UPLOAD)
    async_upload_tmp_folder: str | None = option(
        None, "Folder in which checkpoints wait for their upload.", ignored="they wait in memory"
    )
    universal_ckpt: dict[str, Any] | None = option(
        None, "Write checkpoints that fit every layout.", ignored="every checkpoint fits every layout"
    )
    generate_meta_data: dict[str, Any] | None = option(
        None, "Write a file that describes the layout.", ignored="the layout is in the checkpoint's manifest.json"
    )
    need_metadata: bool | None = option(
        None, "A value that InternEvo sets itself.", ignored="the layout is in the checkpoint's manifest.json"
    )

    @field_validator("checkpoint_every", "oss_snapshot_freq", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        # InternEvo's configs write float("inf") or None for "never".
        return 0 if value in (None, float("inf"), "inf") else value

    @field_validator("save_ckpt_folder", mode="before")
    @classmethod
    def _local(cls, value: Any) -> Any:
        if isinstance(value, str) and value.startswith("local:"):
            return value.removeprefix("local:")
        if isinstance(value, str) and value.split(":")[0] in ("boto3", "volc", "oss2", "s3", "vc", "ali"):
            raise ValueError(f"not available yet: object storage ({value!r}); use a local folder")
        return value


class Alert(Section):
    """How people are told of warnings and errors."""

    enable_feishu_alert: bool = option(False, "Send alerts to a webhook.", not_available="alerts by webhook")
    feishu_alert_address: str | None = option(None, "Address of the webhook.", ignored="it is for enable_feishu_alert")
    light_monitor_address: str | None = option(None, "Address to which a heartbeat is sent.", not_available="heartbeats")
    alert_file_path: PathText | None = option(None, "File to which rank 0 writes its warnings and errors, besides the log.")


class TensorBoard(Section):
    """TensorBoard files."""

    queue_max_length: int = option(10, "Number of scalars that are collected before they are written to the file.", ge=1)


class WandB(Section):
    """Weights & Biases."""

    project: str | None = option(None, "Project. None: JOB_NAME.")
    entity: str | None = option(None, "User or team. None: as wandb decides.")
    name: str | None = option(None, "Name of the run. None: JOB_NAME.")
    group: str | None = option(None, "Group of the run.")
    tags: tuple[str, ...] = option((), "Tags of the run.")
    mode: Literal["online", "offline"] = option(
        "online", "offline: write to RUN/wandb only, which `wandb sync` uploads later.",
    )  # fmt: skip


class MLflow(Section):
    """MLflow."""

    tracking_uri: str | None = option(None, "Address of the server or database. None: MLFLOW_TRACKING_URI, or MLflow's own.")
    experiment: str | None = option(None, "Experiment, which is made if there is none. None: JOB_NAME.")


class Trackio(Section):
    """Hugging Face's trackio."""

    project: str | None = option(None, "Project. None: JOB_NAME.")
    space_id: str | None = option(None, "Hugging Face Space with the dashboard. None: files on this machine.")


class Monitor(Section):
    """What is measured, logged and checked during training."""

    alert: Alert = option(Alert(), "How people are told of warnings and errors.")
    trackers: tuple[Literal["wandb", "mlflow", "trackio"], ...] = option(
        (),
        'Trackers of experiments that get the metrics, besides TensorBoard (enable_tb): "wandb", "mlflow", "trackio".',
    )
    tensorboard: TensorBoard = option(TensorBoard(), "TensorBoard files.")
    wandb: WandB = option(WandB(), "Weights & Biases, if monitor.trackers names it.")
    mlflow: MLflow = option(MLflow(), "MLflow, if monitor.trackers names it.")
    trackio: Trackio = option(Trackio(), "trackio, if monitor.trackers names it.")
    log_every: int = option(
        1, "Number of steps between lines of output. A terminal also shows the last step, below the lines.", unit="steps", ge=1
    )
    sample_prompts: tuple[str, ...] = option(
        (), "Prompts that the model continues; the report shows the texts. Needs data.tokenizer_path."
    )
    sample_every: int = option(
        0,
        "Number of steps between these samples. 0: only at the end of the run.",
        unit="steps",
        ge=0,
        needs="monitor.sample_prompts",
    )
    sample_tokens: int = option(
        64, "Number of tokens to generate for each prompt.", unit="tokens", ge=1, le=MAX_SIZE, needs="monitor.sample_prompts"
    )
    tasks: tuple[str, ...] = option(
        (),
        "Tasks of lm-eval on which the model is evaluated. Needs data.tokenizer_path, and the package lm-eval (pip install "
        "'internevo[eval]').",
    )
    evaluate_every: int = option(
        0,
        "Number of steps between these evaluations. 0: only at the end of the run.",
        unit="steps",
        ge=0,
        needs="monitor.tasks",
    )
    task_folder: PathText | None = option(None, "Folder with task files of your own.", needs="monitor.tasks")
    task_limit: int | None = option(
        None, "Number of documents of each task to evaluate on, the first ones. None: all.", ge=1, needs="monitor.tasks"
    )
    peak_tflops: float | None = option(
        None,
        "Peak performance of one device for the model's dtype, from which MFU is computed. None: that of the GPU, if known.",
        unit="TFLOPS",
        gt=0,
    )
    timeout: float = option(
        300.0,
        "Longest time that a step may take, except the first. If a step takes longer, the run ends with an error that names "
        "the rank it waits for. (Five times the time of the slowest step so far, per token, is always allowed.) 0: no limit.",
        unit="seconds",
        ge=0,
        le=1e9,
    )
    max_skipped_steps: int = option(
        5,
        "Number of steps in a row, skipped because their gradients are not finite, after which the run ends with an error. In "
        "fp16, steps after which the loss scale can still shrink do not count. 0: no limit.",
        unit="steps",
        ge=0,
    )
    memory: bool = option(
        False,
        "Measure the memory of the first step: compare it with the formula, in a table on the console and in memory.json; and "
        "record what was alive when, by kind and module, in memory/rank-N.json, drawn in report.html. On a GPU, "
        "memory/rank-N.pickle is the history of PyTorch's allocator. The layers are not compiled in this step.",
    )
    comm: bool = option(
        False,
        "Count and time the collectives of the second step, in a table on the console and in comm.json. In this step the run "
        "waits for each collective, so that its time can be measured.",
    )
    trace: bool = option(
        False,
        "Record a timeline of the third step in trace-rankN.json.gz, which Chrome and Perfetto can show. With a pipeline, the "
        "passes and messages of its ranks are also in timeline.json, and drawn in report.html.",
    )

    @field_validator("trackers")
    @classmethod
    def _once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(value))

    @property
    def needs_tokenizer(self) -> bool:
        """Whether text is generated or evaluated during training."""
        return bool(self.sample_prompts or self.tasks)


class Generation(Section):
    """InternEvo's options for text generation."""

    ckpt_folder: str | None = option(None, "Checkpoint of the model.", ignored=COMMAND)
    output_folder: str | None = option(None, "Folder to which the texts are written.", ignored=COMMAND)
    batch_size: int = option(1, "Number of texts that are generated at once.", ignored=COMMAND, ge=1)
    max_length: int = option(100, "Maximum length of a text, including the prompt.", unit="tokens", ignored=COMMAND, ge=1)
    eos_id: int | list[int] | None = option(None, "Ids of the tokens that end a text.", ignored=COMMAND)
    bos_id: int | None = option(None, "Id of the token that starts a text.", ignored=COMMAND)
    pad_id: int | None = option(None, "Id of the padding token.", ignored=COMMAND)
    do_sample: bool = option(True, "Draw each token at random. False: always take the most likely token.", ignored=COMMAND)
    temperature: float = option(1.0, "The logits are divided by this.", ignored=COMMAND, ge=0)
    top_k: int = option(50, "Draw only from this many most likely tokens. 0: from all.", ignored=COMMAND, ge=0)
    top_p: float = option(
        1.0, "Draw only from the most likely tokens whose probabilities add up to this.", ignored=COMMAND, gt=0, le=1
    )
    repetition_penalty: float = option(
        1.0, "The logits of tokens that are already in the text are divided by this.", ignored=COMMAND
    )
    length_penalty: float = option(1.0, "Exponent of the length in the score of beam search.", ignored=COMMAND)
