"""Chooses the size of a micro-batch by the memory of this machine, for a config that has everything else."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

import torch

from ..config import Config
from ..errors import InternEvoError
from ..models.families.registry import decoder_config
from ..parallel import plan
from ..parallel.layout import Layout
from ..parallel.strategy import Workload

USED = 0.7
"""The share of the free memory that the formula may reach; it knows no temporary buffers."""


def free_memory(device: torch.device, processes: int) -> int:
    """Returns the bytes that a process may use: those that are free on its GPU, or its share of this machine's memory.

    Raises:
        InternEvoError: if the GPU cannot be used.
    """
    if device.type == "cuda":  # in a process of its own, since whoever asks has memory on the GPU until it ends
        command = [sys.executable, "-c", f"import torch; print(torch.cuda.mem_get_info({device.index or 0})[0])"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise InternEvoError(f"the free memory of {device} cannot be read: {reason}")
        return int(done.stdout)
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    meminfo, group = Path("/proc/meminfo"), Path("/sys/fs/cgroup")
    if meminfo.is_file():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        limits.append(int(fields["MemAvailable"].split()[0]) * 1024)
    if (group / "memory.max").is_file() and (limit := (group / "memory.max").read_text().strip()) != "max":
        limits.append(int(limit) - int((group / "memory.current").read_text()))
    return max(0, min(limits)) // processes


def needed_memory(config: Config, processes: int, device: str) -> int:
    """Returns the bytes that a rank needs by the formula. With adapters, the other weights have no gradients and no moments."""
    layout = Layout.from_config(config, processes)
    decoder = replace(decoder_config(config.model_type, config.model), lora=None)
    work = Workload.from_config(decoder, config, layout, 2, device)
    memory = plan.memory(work)
    if config.model.lora is None:
        return memory.total
    return memory.activations + decoder.parameters() * (4 if processes > 1 else work.element_bytes)


CHECKPOINT, FSDP = "model.checkpoint", "parallel.zero1.fsdp"
"""The keys that may be changed so that a run fits, besides the size of a micro-batch."""


def fitted(
    config: Config, sizes: list[int], processes: int, device: torch.device, fixed: Collection[str] = ()
) -> tuple[Config, bool]:
    """Returns the config with the largest size of a micro-batch that fits into the memory.

    If none does, layers are computed again in the backward pass; if the smallest does not fit then either, on several
    processes the weights are sharded, too (FSDP).

    Args:
        sizes: in rows, the largest first.
        fixed: those of ``CHECKPOINT`` and ``FSDP`` that stay as they are.

    Returns:
        The config; and whether it fits.
    """
    limit = USED * free_memory(device, processes)
    sharded = config.parallel.model_copy(update={"zero1": config.parallel.zero1.model_copy(update={"fsdp": True})})
    may_shard = processes > 1 and config.model.lora is None and FSDP not in fixed
    for parallel in (config.parallel, *([sharded] if may_shard else [])):
        for checkpoint in (config.model.checkpoint,) if CHECKPOINT in fixed else (0.0, 1.0):
            model = config.model.model_copy(update={"checkpoint": checkpoint})
            for size in sizes:
                data = config.data.model_copy(update={"micro_bsz": size})
                tried = config.model_copy(update={"data": data, "model": model, "parallel": parallel})
                if needed_memory(tried, processes, device.type) <= limit:
                    return tried, True
    return tried, False
