"""Strict JSON files: without NaN and infinity, so that every JSON reader can read them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from ..errors import UsageError
from .naming import naming
from .replace import replace_text


def read_object(path: Path) -> dict[str, Any]:
    """Reads the JSON object in a file.

    Raises:
        UsageError: if the file cannot be read, or is not JSON, or its top level is not an object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))  # a byte order mark is left out
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{path} is JSON, but not an object ({{...}}) at its top level")
    return values


def to_json(values: Any, indent: int | None = None, escaped: bool = True) -> str:
    """Converts ``values`` to JSON text. NaN and infinity, which JSON does not have, become null at any depth.

    Args:
        escaped: write characters that are not ASCII as escapes.
    """
    return json.dumps(_finite(values), indent=indent, allow_nan=False, ensure_ascii=escaped)


def finite_json(values: Any) -> str:
    """Converts values without NaN and infinity to JSON text, several times as fast as ``to_json``. Dataclasses become objects.

    Raises:
        ValueError: if there is NaN or infinity.
    """
    return json.dumps(values, allow_nan=False, default=vars)


def write_json(path: Path, values: Any, indent: int | None = None) -> None:
    """Writes ``values`` to a file as JSON; NaN and infinity become null."""
    with naming(path):
        path.write_text(to_json(values, indent) + "\n", encoding="utf-8")


def replace_json(path: Path, values: Any, indent: int | None = None) -> None:
    """As ``write_json``, for a file that may exist: it has the old or the new values at every moment."""
    replace_text(path, to_json(values, indent) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
