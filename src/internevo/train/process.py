"""Sets up this process for training: PyTorch's switches, the memory allocator and the garbage collector."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from warnings import filterwarnings

import torch

from ..config import Config
from ..config.axes import head_size
from ..errors import ConfigError
from ..models.families.registry import decoder_config
from ..ops import flash
from ..ops.precision import COMPUTE, is_slow
from ..parallel.world import has_gpu

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
"""Options of glibc's ``mallopt``."""
WORKSPACE, DETERMINISTIC = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")
"""cuBLAS's environment variable, and its values with which products of several streams are deterministic
(https://docs.nvidia.com/cuda/cublas/#results-reproducibility)."""


@contextmanager
def determinism(config: Config) -> Iterator[None]:
    """A context in which the same computation always gives the same bits, if ``config.deterministic`` is set. Otherwise it
    changes nothing. Afterwards, the mode is as it was before.

    It must be entered before the world is joined: cuBLAS and NCCL read their settings when they start. (PyTorch then also tells
    NCCL not to add in the switches, unless NCCL_ALGO is set: their order is not fixed.)

    Raises:
        ConfigError: if the environment asks cuBLAS for another workspace.
    """
    if not config.deterministic:
        yield
        return
    workspace, on_gpu = os.environ.get(WORKSPACE), has_gpu()
    memory: Any = torch.utils.deterministic  # a module with a property
    if on_gpu and workspace not in (None, *DETERMINISTIC):
        raise ConfigError(
            f"deterministic = True does not work with {WORKSPACE}={workspace} in the environment, with which cuBLAS is not "
            f"deterministic; unset it, or set it to {' or '.join(DETERMINISTIC)}"
        )
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = memory.fill_uninitialized_memory
    try:
        if on_gpu:
            os.environ[WORKSPACE] = workspace or DETERMINISTIC[0]
        torch.use_deterministic_algorithms(True)
        memory.fill_uninitialized_memory = False  # nothing is read before it is written; filling it takes time
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = filled
        if workspace is None:
            os.environ.pop(WORKSPACE, None)


def prepare(config: Config, device: torch.device) -> None:
    """Sets up the process. Must be called before tensors are allocated.

    Raises:
        ConfigError, InternEvoError: if ``model.flash_attention`` cannot be used.
    """
    if device.type == "cpu":
        keep_freed_memory()
    # fully_shard warns of operations in place on a view, which a sharded embedding returns. The decoder has none.
    filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view", category=UserWarning)
    torch.backends.cudnn.deterministic = config.cudnn_deterministic
    torch.backends.cudnn.benchmark = config.cudnn_benchmark
    if config.model.dtype == "tf32":
        torch.backends.cuda.matmul.allow_tf32 = True
    if device.type == "cuda":
        flash.restore()
        heads = _flash_attention(config)
        if heads is not None:
            flash.choose(config.model.flash_attention, heads, device)


def unsuited(config: Config, device: torch.device) -> list[str]:
    """Returns warnings about options that do not suit the device."""
    model, warnings = config.model, list[str]()
    if is_slow(model.dtype, device):
        warnings.append(
            f"warning: this CPU has no instructions for model.dtype = {model.dtype!r}; "
            "model.dtype=torch.float32 is hundreds of times faster on it"
        )
    if model.flash_attention != 2 and (device.type != "cuda" or _flash_attention(config) is None):
        warnings.append(
            f"warning: model.flash_attention = {model.flash_attention} has no effect: it is for half precision on NVIDIA GPUs, "
            "without ALiBi and capped scores"
        )
    return warnings


def _flash_attention(config: Config) -> flash.Heads | None:
    """Returns the attention of a rank, if another generation of flash attention is to compute it."""
    dtype = COMPUTE[config.model.dtype]
    if config.model.flash_attention == 2 or dtype == torch.float32:
        return None
    decoder, ranks = decoder_config(config.model_type, config.model), head_size(config)
    if decoder.rope is None or decoder.attention_softcap:
        return None
    return flash.Heads(
        decoder.num_heads // ranks, max(1, decoder.num_kv_heads // ranks), decoder.head_dim, decoder.windows, dtype
    )


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory for later allocations.

    By default, glibc maps new memory for each large tensor and unmaps it when the tensor is freed. The kernel clears each new
    page at its first use, which takes a fifth of a training step on a CPU. One arena for all threads, because the others return
    memory whatever is set: gloo's thread allocates, too. With another C library this has no effect.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_ARENA_MAX, 1)


class GarbageCollector:
    """Runs Python's garbage collector after the same steps on every rank.

    By default it runs when a process has made enough objects, which is at a different time on each rank; then all other ranks
    wait for that rank in their next collective. Objects that exist after the first step (the model, compiled code) are kept for
    the whole run, and are not visited again.
    """

    EVERY = 50
    """Number of steps between two collections."""

    def __init__(self) -> None:
        self.active = False

    def after_step(self, step: int) -> None:
        """Must be called after each step. After the first, automatic collection is turned off."""
        if not self.active:
            self.active = True
            gc.collect()
            gc.freeze()
            gc.disable()
        elif step % self.EVERY == 0:
            gc.collect()

    def collect(self) -> None:
        """Collects now. Called after work between steps, in which all ranks take part."""
        gc.collect()

    def release(self) -> None:
        """Turns automatic collection on again."""
        if self.active:
            gc.unfreeze()
            gc.enable()
