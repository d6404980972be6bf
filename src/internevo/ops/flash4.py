"""Flash attention 4 (the package flash-attn-4) as PyTorch 2.13 calls it. Only ``flash.activate`` lets PyTorch import this.

PyTorch expects the output and the log-sum-exp from the forward pass. Since 4.0.0b19, the package returns more.
"""

from __future__ import annotations

from typing import Any

from flash_attn.cute import interface  # type: ignore[import-not-found, unused-ignore]

_flash_attn_bwd = interface._flash_attn_bwd


def _flash_attn_fwd(*arguments: Any, **options: Any) -> Any:
    return interface._flash_attn_fwd(*arguments, **options)[:2]
