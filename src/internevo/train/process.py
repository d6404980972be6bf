"""How this process is set up for training: its memory allocator, its garbage collector and PyTorch's switches."""

from __future__ import annotations

import ctypes
import gc
import sys

import torch

from ..config import Config

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT = 32 << 20
"""Bytes up to which a tensor's memory is kept: the most that glibc allows. Kept memory fragments; larger ones go back."""


def prepare(config: Config, device: torch.device) -> None:
    """Sets what is the process's own, before anything is allocated."""
    if device.type == "cpu":
        keep_freed_memory()
    torch.backends.cudnn.deterministic = config.cudnn_deterministic
    torch.backends.cudnn.benchmark = config.cudnn_benchmark
    if config.model.dtype == "tf32":
        torch.backends.cuda.matmul.allow_tf32 = True


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory and give it out again.

    By default large tensors are mapped anew and unmapped when freed, and the kernel clears each of their pages at first
    touch, which takes a fifth of a training step on a CPU. Has no effect where the C library is another one.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, KEPT)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


class GarbageCollector:
    """Python's garbage collector, at the same steps on every rank.

    Left alone it runs when a rank has made enough objects: at another moment on each, and all others wait for that rank in
    their next collective. What is there after the first step (the model, compiled code) stays, and is not looked at again.
    """

    EVERY = 50

    def __init__(self) -> None:
        self.held = False

    def after_step(self, step: int) -> None:
        """Takes over after the first step; from then on collects every ``EVERY`` steps."""
        if not self.held:
            self.held = True
            gc.collect()
            gc.freeze()
            gc.disable()
        elif step % self.EVERY == 0:
            gc.collect()

    def collect(self) -> None:
        """After other work of all ranks."""
        gc.collect()

    def release(self) -> None:
        """Python collects by itself again."""
        if self.held:
            gc.unfreeze()
            gc.enable()
