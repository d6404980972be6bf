"""Host memory on a CPU run."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT = 32 << 20
"""Bytes up to which a tensor's memory is kept: the most that glibc allows. Kept memory fragments; larger ones go back."""


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
