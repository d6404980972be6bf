"""Kernels: the best one for the device, chosen here and nowhere else."""

from .attention import attention
from .cross_entropy import linear_cross_entropy
from .host_memory import keep_freed_memory
from .norm import rms_norm
from .swiglu import swiglu

__all__ = ["attention", "keep_freed_memory", "linear_cross_entropy", "rms_norm", "swiglu"]
