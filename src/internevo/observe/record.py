"""The records of finished steps, evaluations and saves, and how speed and memory are determined."""

from __future__ import annotations

import re
import resource
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

PEAK_TFLOPS = {
    "B200": 2250.0, "GB200": 2500.0,
    "H200": 989.0, "H200 NVL": 835.0, "GH200": 989.0, "H100": 989.0, "H100 PCIE": 756.0, "H100 NVL": 835.0, "H800": 989.0,
    "H800 PCIE": 756.0, "H20": 148.0,
    "A100": 312.0, "A800": 312.0, "A30": 165.0, "A40": 149.7, "A10": 125.0, "A10G": 70.0, "A6000": 154.8,
    "L40S": 362.0, "L40": 181.0, "L20": 119.5, "L4": 121.0, "4090": 165.2, "4090 D": 147.0, "3090": 71.0, "3090 TI": 80.0,
    "V100": 125.0, "V100 PCIE": 112.0, "V100S": 130.0,
}  # fmt: skip
"""Words of a device's name -> its peak in TFLOPS for dense bf16 or fp16 (from the vendors' data sheets)."""
UNKNOWN = {"MIG", "LAPTOP", "MAX"}
"""Words in the names of devices that are a part of one of these devices, or slower. Their peak is not known."""


@dataclass
class StepRecord:
    """A training step: a row of metrics.jsonl."""

    step: int
    """Number of the step, from 1."""
    loss: float
    """Mean loss over the predicted tokens of the global batch."""
    grad_norm: float
    """Global L2 norm of the gradient before clipping."""
    lr: float
    """Learning rate."""
    tokens: int
    """Tokens of this step, over all ranks."""
    consumed_tokens: int
    """Tokens of all steps so far, over all ranks."""
    tgs: float
    """Tokens per device per second."""
    tflops: float
    """TFLOPS per device."""
    mfu: float | None
    """Share of the device's peak; None if the peak is unknown."""
    step_time: float
    """Seconds, without ``data_time``."""
    data_time: float
    """Seconds of waiting for data."""
    memory_peak: int
    """Peak memory of this rank, in bytes."""
    memory_peak_max: int
    """The largest peak memory of all ranks, in bytes."""
    skipped: bool
    """Whether the gradients were not finite, so that nothing was updated."""
    time: float
    """Unix time at the end of the step."""
    loss_by_type: dict[str, float] = field(default_factory=dict)
    """Dataset type -> mean loss, if there are several types."""
    loss_scale: float | None = None
    """The loss scale; None except in fp16."""
    skipped_steps: int = 0
    """Number of steps skipped so far."""
    data_skipped: int = 0
    """Documents (or rows of tokenized data) left out so far because they could not be read (``data.on_error``)."""
    moe: dict[str, Any] | None = None
    """For mixtures of experts: each expert's share of the load, as the mean over layers (load); the largest load of any expert
    in any layer, as a multiple of the mean load (max_load); the share of dropped choices (dropped); the mean entropy of the
    routers in nats (entropy); the auxiliary losses (auxiliary_loss)."""

    def to_dict(self) -> dict[str, Any]:
        """Returns the row for metrics.jsonl."""
        return asdict(self)


@dataclass
class ValidRecord:
    """An evaluation: a row of metrics.jsonl."""

    step: int
    """The step after which the model was evaluated."""
    valid_loss: float
    """Mean loss over the predicted tokens of the validation data."""
    valid_ppl: float
    """Perplexity."""
    time: float
    """Unix time at the end of the evaluation."""
    valid_loss_by_type: dict[str, float] = field(default_factory=dict)
    """Dataset type -> mean loss."""
    valid_ppl_by_type: dict[str, float] = field(default_factory=dict)
    """Dataset type -> perplexity."""

    def to_dict(self) -> dict[str, Any]:
        """Returns the row for metrics.jsonl."""
        return asdict(self)


@dataclass
class SaveRecord:
    """A checkpoint or a snapshot that is complete."""

    step: int
    folder: Path
    nbytes: int
    seconds: float
    """Time since the save was started, most of it in the background."""
    snapshot: bool
    time: float
    """Unix time at the end of the save."""


@dataclass
class TaskRecord:
    """An evaluation on tasks of lm-eval: a row of metrics.jsonl."""

    step: int
    """The step after which the model was evaluated."""
    tasks: dict[str, dict[str, float]]
    """Task -> metric -> value, and its standard error as METRIC_stderr."""
    time: float
    """Unix time at the end of the evaluation."""

    def to_dict(self) -> dict[str, Any]:
        """Returns the row for metrics.jsonl."""
        return asdict(self)

    def values(self) -> dict[str, float]:
        """Returns TASK/METRIC -> value, without standard errors."""
        return {
            f"{task}/{metric}": value
            for task, metrics in self.tasks.items()
            for metric, value in metrics.items()
            if "_stderr" not in metric
        }


def peak_tflops(device: torch.device, dtype: str, given: float | None) -> float | None:
    """Returns the peak of one device in TFLOPS: ``given``, if it is not None, or a known one, or None."""
    if given is not None or device.type != "cuda" or dtype not in ("bfloat16", "float16"):
        return given
    return known_peak(torch.cuda.get_device_name(device))


def known_peak(name: str) -> float | None:
    """Returns the peak of a device in TFLOPS for dense bf16 or fp16, or None if it is not known.

    Args:
        name: the device's name as PyTorch gives it. Of the entries whose words are all in it, the one with most words counts.
    """
    words = set(re.findall(r"\w+", name.upper()))
    matches = [known for known in PEAK_TFLOPS if words.issuperset(known.split()) and not words & UNKNOWN]
    return PEAK_TFLOPS[max(matches, key=lambda known: len(known.split()))] if matches else None


def memory_peak(device: torch.device) -> int:
    """Returns the peak memory of this process in bytes: of the GPU, or, on a CPU, of the process itself."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
