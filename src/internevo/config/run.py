"""Checkpoints, monitoring and generation."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import field_validator

from .option import Section, option

COMMAND = "`internevo generate` takes its options on the command line"
UPLOAD = "saving always goes on in the background"
CONTENTS = ("model", "optimizer", "scheduler", "sampler", "all")


class LoadCkptInfo(Section):
    """What a new run starts from."""

    path: str | None = option(None, "Checkpoint, run folder or Hugging Face folder; None: start anew.")
    content: tuple[str, ...] = option(("all",), "Parts to load: model, optimizer, scheduler, sampler, all.")
    ckpt_type: Literal["internevo", "internlm", "hf", "llama", "hf_llama", "hf_model", "LLAMA", "normal"] = option(
        "internevo", 'Kind of checkpoint: "internevo" (ours) or "hf" (Hugging Face).'
    )

    @field_validator("content", mode="before")
    @classmethod
    def _contents(cls, value: Any) -> Any:
        names = (value,) if isinstance(value, str) else tuple(value)
        names = tuple(str(n).lower() for n in names)
        unknown = [n for n in names if n not in CONTENTS]
        if unknown:
            raise ValueError(f"{unknown[0]!r} is not one of {', '.join(CONTENTS)}")
        return names

    def has(self, part: str) -> bool:
        """Whether ``part`` is to be loaded."""
        return part in self.content or "all" in self.content


class Ckpt(Section):
    """Saving and loading. Everything a run writes is in ``save_ckpt_folder``."""

    enable_save_ckpt: bool = option(True, "Save checkpoints.")
    save_ckpt_folder: str | None = option(None, "The run folder; by default runs/JOB_NAME.")
    checkpoint_every: int = option(0, "Steps between checkpoints, and at the end; 0: only at the end.", unit="steps", ge=0)
    keep_last: int | None = option(None, "Keep so many newest checkpoints; None: all.", ge=1)
    keep_every: int | None = option(None, "Keep every checkpoint whose step is a multiple of this.", unit="steps", ge=1)
    oss_snapshot_freq: int = option(0, "Steps between snapshots, kept in two alternating folders; 0: none.", unit="steps", ge=0)
    auto_resume: bool = option(True, "Go on from the newest complete checkpoint or snapshot in the run folder.")
    load_ckpt_info: LoadCkptInfo | None = option(None, "What a new run starts from.")
    enable_internevo2hf_ckpt: bool = option(False, "Also export each checkpoint to hf/step-N in Hugging Face form.")
    stop_file_path: str | None = option(
        None, 'A file read at each step: "N": save and stop at step N; "-N": save at step N and go on.'
    )
    snapshot_ckpt_folder: str | None = option(None, "Folder of the snapshots.", ignored="they are in the run folder")
    async_upload: bool = option(False, "Background upload.", ignored=UPLOAD)
    async_upload_tmp_folder: str | None = option(None, "Staging folder.", ignored="staging is in memory")
    universal_ckpt: dict[str, Any] | None = option(None, "Layout-free format.", ignored="every checkpoint is layout-free")
    generate_meta_data: dict[str, Any] | None = option(None, "Layout file.", ignored="the manifest holds it")
    need_metadata: bool | None = option(None, "Set by InternEvo itself.", ignored="the manifest holds it")

    @field_validator("checkpoint_every", "oss_snapshot_freq", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        # InternEvo's configs write float("inf") or None for "never".
        return 0 if value is None or value == float("inf") else value

    @field_validator("save_ckpt_folder", mode="before")
    @classmethod
    def _local(cls, value: Any) -> Any:
        if isinstance(value, str) and value.startswith("local:"):
            return value.removeprefix("local:")
        if isinstance(value, str) and value.split(":")[0] in ("boto3", "volc", "oss2", "s3", "vc", "ali"):
            raise ValueError(f"not available yet: object storage ({value!r}); use a folder")
        return value


class Alert(Section):
    """Messages to people."""

    enable_feishu_alert: bool = option(False, "Post alerts to a webhook.", later="alerts by webhook")
    feishu_alert_address: str | None = option(None, "Address of the webhook.")
    light_monitor_address: str | None = option(None, "Address of a heartbeat.", later="heartbeats")
    alert_file_path: str | None = option(None, "File to which rank 0 also writes its warnings and errors.")


class TensorBoard(Section):
    """TensorBoard."""

    queue_max_length: int = option(10, "Scalars kept before they are written.", ge=1)


class Monitor(Section):
    """What is watched while training."""

    alert: Alert = option(Alert(), "Messages to people.")
    tensorboard: TensorBoard = option(TensorBoard(), "TensorBoard.")
    log_every: int = option(1, "Steps between lines on a console that is not a terminal.", unit="steps", ge=1)
    sample_prompts: tuple[str, ...] = option((), "Texts to continue, for the report; needs data.tokenizer_path.")
    sample_every: int = option(0, "Steps between samples; 0: only at the end.", unit="steps", ge=0)
    sample_tokens: int = option(64, "Length of a sample.", unit="tokens", ge=1)
    peak_tflops: float | None = option(
        None, "Peak of one device for the model's dtype, for MFU; by default known GPUs'.", unit="TFLOPS", gt=0
    )
    timeout: float = option(
        300.0,
        "Longest that a step may take, the first excepted: then the run ends, and says which rank it waits for. Steps that are "
        "slow by nature are allowed five times the slowest before. 0: no limit.",
        unit="seconds",
        ge=0,
    )
    memory: bool = option(
        False, "Measure the memory of the run's first step beside the formula's: a table on the console, and memory.json."
    )
    comm: bool = option(
        False,
        "Count and time the collectives of its second step, each waited for by itself: a table on the console, and comm.json.",
    )
    trace: bool = option(False, "Record a timeline of its third step: trace-rankN.json.gz, for Chrome or Perfetto.")


class Generation(Section):
    """InternEvo's options of text generation."""

    ckpt_folder: str | None = option(None, "Checkpoint to generate from.", ignored=COMMAND)
    output_folder: str | None = option(None, "Where texts go.", ignored=COMMAND)
    batch_size: int = option(1, "Texts at once.", ignored=COMMAND, ge=1)
    max_length: int = option(100, "Length, prompt included.", unit="tokens", ignored=COMMAND, ge=1)
    eos_id: int | list[int] | None = option(None, "Tokens that end a text.", ignored=COMMAND)
    bos_id: int | None = option(None, "Token that starts a text.", ignored=COMMAND)
    pad_id: int | None = option(None, "Padding token.", ignored=COMMAND)
    do_sample: bool = option(True, "Sample, or take the likeliest token.", ignored=COMMAND)
    temperature: float = option(1.0, "Divides the logits.", ignored=COMMAND, ge=0)
    top_k: int = option(50, "Sample from so many likeliest tokens; 0: all.", ignored=COMMAND, ge=0)
    top_p: float = option(1.0, "Sample from the likeliest tokens of this total probability.", ignored=COMMAND, gt=0, le=1)
    repetition_penalty: float = option(1.0, "Divides logits of tokens already there.", ignored=COMMAND)
    length_penalty: float = option(1.0, "Of beam search.", ignored=COMMAND)
