"""A plugin of coverage: libraries are imported without being traced, which would make the import of PyTorch a third slower.

(Python 3.12 traces without such a cost, through sys.monitoring.)
"""

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any

LIBRARIES = {"numpy", "plotly", "pyarrow", "pydantic", "rich", "tensorboard", "tokenizers", "torch", "transformers", "typer"}


class Untraced(SourceFileLoader):
    """Runs a module, and all that it imports, with this thread's tracer set aside."""

    def exec_module(self, module: ModuleType) -> None:
        tracer = sys.gettrace()
        sys.settrace(None)
        try:
            super().exec_module(module)
        finally:
            sys.settrace(tracer)


class Finder:
    """Finds what Python's own finder finds, and has libraries loaded untraced."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name.split(".")[0] not in LIBRARIES or sys.gettrace() is None:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and type(spec.loader) is SourceFileLoader:
            spec.loader = Untraced(spec.loader.name, spec.loader.path)
        return spec


def coverage_init(registry: Any, options: Any) -> None:
    sys.meta_path.insert(0, Finder)
