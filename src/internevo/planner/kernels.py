"""Times of kernels: a roofline per class of kernels (https://doi.org/10.1145/1498765.1498785) with calibrated efficiencies.

A matrix product computes at a share of the peak, and in addition waits for the bytes of its tiles: the time is the sum of both,
and not the larger one, because measured roofs are smooth. The lower efficiency of small products follows from it.
"""

from __future__ import annotations

from .calibration import Calibration
from .flops import Amounts
from .hardware import GIGA, GPU


def seconds(amounts: Amounts, gpu: GPU, calibration: Calibration, precision: str = "bf16") -> float:
    """Returns the time of kernels one after the other."""
    bandwidth = gpu.memory_gb_per_s * GIGA * calibration.memory
    dense = gpu.peak("bf16") * calibration.products
    layers = gpu.peak("fp8") * calibration.products_fp8 if precision == "fp8" else dense
    return (
        amounts.products / layers
        + amounts.head / dense
        + amounts.attention / (gpu.peak("bf16") * calibration.attention)
        + (amounts.moved + amounts.memory) / bandwidth
        + amounts.kernels * calibration.launch
    )
