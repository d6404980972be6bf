"""The value of a finished step, and the speed and memory figures in it."""

from __future__ import annotations

import re
import resource
import sys
from dataclasses import asdict, dataclass, field
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
"""Dense bf16/fp16 peaks of one device, by words of its name (vendors' data sheets)."""
PARTS = {"MIG", "LAPTOP", "MAX"}
"""Words of the names of devices that are a part of one of those, or slower: their peak is not known."""


@dataclass
class StepRecord:
    """One line of metrics.jsonl."""

    step: int
    """From 1."""
    loss: float
    """Mean over the global batch's predicted tokens."""
    grad_norm: float
    """Before clipping."""
    lr: float
    tokens: int
    """Of this step, over all ranks."""
    consumed_tokens: int
    tgs: float
    """Tokens per device per second."""
    tflops: float
    """Per device."""
    mfu: float | None
    """Share of the device's peak; None when the peak is unknown."""
    step_time: float
    """Seconds."""
    data_time: float
    """Seconds spent waiting for data."""
    memory_peak: int
    """Bytes, this rank."""
    memory_peak_max: int
    """Bytes, the largest of all ranks."""
    skipped: bool
    """The gradients were not finite, nothing was updated."""
    time: float
    """Unix time at the end of the step."""
    loss_by_type: dict[str, float] = field(default_factory=dict)
    loss_scale: float | None = None
    """fp16 only."""
    skipped_steps: int = 0
    """Skipped so far."""
    data_skipped: int = 0
    """Documents (rows of tokenized data) left out so far, since they could not be read (data.on_error)."""
    moe: dict[str, Any] | None = None
    """Mixtures of experts: each expert's share of the load (mean over layers), the fullest expert of any layer over its even
    share (max_load), share of choices dropped, mean entropy of the routers (nats), auxiliary losses."""

    def to_dict(self) -> dict[str, Any]:
        """As a row of metrics.jsonl."""
        return asdict(self)


@dataclass
class ValidRecord:
    """One evaluation."""

    step: int
    valid_loss: float
    valid_ppl: float
    time: float
    valid_loss_by_type: dict[str, float] = field(default_factory=dict)
    valid_ppl_by_type: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As a row of metrics.jsonl."""
        return asdict(self)


def peak_tflops(device: torch.device, dtype: str, given: float | None) -> float | None:
    """Peak of one device in TFLOPS, if it is given or known."""
    if given is not None or device.type != "cuda" or dtype not in ("bfloat16", "float16"):
        return given
    return known_peak(torch.cuda.get_device_name(device))


def known_peak(name: str) -> float | None:
    """Dense bf16/fp16 peak of a device, in TFLOPS, by its name: what fits most of its words."""
    words = set(re.findall(r"\w+", name.upper()))
    fits = [known for known in PEAK_TFLOPS if words.issuperset(known.split()) and not words & PARTS]
    return PEAK_TFLOPS[max(fits, key=lambda known: len(known.split()))] if fits else None


def memory_peak(device: torch.device) -> int:
    """Most memory this process has held, in bytes: the device's, or the process's own on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
