"""JSON that this program reads and writes: strict, so that every reader takes it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from ..errors import UsageError


def read_object(path: Path) -> dict[str, Any]:
    """The object that a file holds.

    Raises:
        UsageError: when it is no JSON, or no object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path} does not hold a JSON object")
    return values


def to_json(values: Any, indent: int | None = None) -> str:
    """``values`` as JSON. NaN and infinity, which JSON does not have, are null, however deep they lie."""
    return json.dumps(_finite(values), indent=indent, allow_nan=False)


def write_json(path: Path, values: Any, indent: int | None = None) -> None:
    """Writes ``values`` as JSON to a file."""
    path.write_text(to_json(values, indent) + "\n", encoding="utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
