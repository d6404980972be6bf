"""InternEvo: pre-train and fine-tune large language models, from a laptop to thousands of GPUs."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["load_model", "save_hf"]

if TYPE_CHECKING:
    from .checkpoint.open import load_model
    from .models.huggingface.folder import save_hf

_HOMES = {"load_model": ".checkpoint.open", "save_hf": ".models.huggingface.folder"}


def __getattr__(name: str) -> Any:
    # PyTorch takes seconds to import; `internevo --help` and config checks do without it.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, "__version__"})
