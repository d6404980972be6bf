"""InternEvo: pre-train and fine-tune large language models, from a laptop to thousands of GPUs.

```python
import internevo

config = internevo.load_config("configs/demo.py", ["data.total_steps=100"])
run = internevo.train(config, on_step=lambda record: print(record.step, record.loss))
print("".join(internevo.generate(run, "def")))
print(internevo.evaluate(run, "data/valid").total.perplexity)
internevo.save_hf(internevo.load_model(run), "exported", tokenizer="data")
```
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = [
    "Tokenizer", "chat", "evaluate", "generate", "load_config", "load_model", "plan", "save_hf", "tokenize", "train",
]  # fmt: skip

if TYPE_CHECKING:
    from .checkpoint.open import load_model
    from .data.encoding.tokenize import tokenize
    from .inference.text import chat, generate
    from .models.huggingface.folder import save_hf
    from .planner.plan import plan
    from .text.tokenizer import Tokenizer
    from .train.config import load_config
    from .train.evaluate import evaluate
    from .train.run import train

_HOMES = {
    "Tokenizer": ".text.tokenizer",
    "chat": ".inference.text",
    "evaluate": ".train.evaluate",
    "generate": ".inference.text",
    "load_config": ".train.config",
    "load_model": ".checkpoint.open",
    "plan": ".planner.plan",
    "save_hf": ".models.huggingface.folder",
    "tokenize": ".data.encoding.tokenize",
}


def __getattr__(name: str) -> Any:
    # PyTorch takes seconds to import; `internevo --help` and config checks do without it.
    if name == "train":
        return import_module(".train", __name__)  # a package that can be called
    if name in _HOMES:
        return getattr(import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, "__version__"})
