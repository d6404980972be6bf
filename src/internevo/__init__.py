"""InternEvo: pre-train and fine-tune large language models, from a laptop to thousands of GPUs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["load_model", "save_hf"]

if TYPE_CHECKING:
    from .interchange import load_model, save_hf


def __getattr__(name: str) -> Any:
    # PyTorch takes seconds to import; `internevo --help` and config checks do without it.
    if name in __all__:
        from . import interchange

        return getattr(interchange, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
