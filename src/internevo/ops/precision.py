"""Number types: their names in configs, and which of them a device computes in quickly."""

from __future__ import annotations

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Of weights on disk."""
COMPUTE = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""Type of the computation, by ``model.dtype``."""


def is_slow(dtype: str, device: torch.device) -> bool:
    """Whether a CPU computes in this half precision without instructions for it, hundreds of times slower than in fp32."""
    mkldnn = torch.ops.mkldnn
    fast = {"bfloat16": mkldnn._is_mkldnn_bf16_supported, "float16": mkldnn._is_mkldnn_fp16_supported}
    return device.type == "cpu" and dtype in fast and not fast[dtype]()
