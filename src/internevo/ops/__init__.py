"""Kernels: the best one for the device, chosen here and nowhere else."""

from .attention import attention
from .cross_entropy import linear_cross_entropy
from .norm import rms_norm
from .swiglu import swiglu

__all__ = ["attention", "linear_cross_entropy", "rms_norm", "swiglu"]
