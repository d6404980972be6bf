"""Training: the loop, a step, the optimizer, and what else a run needs. ``internevo.train(config)`` calls ``run.train``."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    """This package has the name of a function of the library, and Python binds it to its parent whenever a file in it is
    imported. So it can be called (https://docs.python.org/3/reference/datamodel.html#customizing-module-attribute-access)."""

    def __call__(self, *arguments: Any, **options: Any) -> Path:
        from .run import train

        return train(*arguments, **options)


sys.modules[__name__].__class__ = _Callable
