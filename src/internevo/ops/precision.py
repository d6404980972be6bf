"""Dtypes: their names in configs, and which of them are slow on a device."""

from __future__ import annotations

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Names of the dtypes that weights on disk may have."""
COMPUTE = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Values of ``model.dtype`` -> the dtype of the computation."""


def is_slow(dtype: str, device: torch.device) -> bool:
    """Whether the device is a CPU that has no instructions for this half-precision dtype. It is then hundreds of times slower
    than fp32."""
    mkldnn = torch.ops.mkldnn
    fast = {"bfloat16": mkldnn._is_mkldnn_bf16_supported, "float16": mkldnn._is_mkldnn_fp16_supported}
    return device.type == "cpu" and dtype in fast and not fast[dtype]()
