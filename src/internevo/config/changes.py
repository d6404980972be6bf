"""What is changed in the config of a run that goes on, next to the config that its checkpoint was trained with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

from pydantic.fields import FieldInfo

from .load import flat
from .option import PathText, field_extras, walk
from .schema import Config

BESIDES = ("JOB_NAME", "enable_tb", "ckpt.", "monitor.", "generation.")
"""How the keys begin that change nothing in the training: names, files, what is measured and printed."""
MOST = 10
"""The largest number of changes that are named."""
LONGEST = 60
"""The longest value that is printed."""
MISSING = object()


def changes(config: Config, recorded: dict[str, Any]) -> list[str]:
    """Returns one line for each key of training that has another value than before, the first ``MOST`` of them.

    Args:
        recorded: the resolved config that was trained with, as in JSON. Keys that it does not have are not compared: it may be
            of another version.
    """
    lines = list(_changes(config, recorded))
    return [*lines[:MOST], *([f"and {len(lines) - MOST} more"] if len(lines) > MOST else [])]


def _changes(config: Config, recorded: dict[str, Any]) -> Iterator[str]:
    values = flat(config)
    for key, field, *_ in walk(config):
        if key.startswith(BESIDES) or _is_path(field) or field_extras(field).get("ignored"):
            continue
        new, old = values[key], _at(recorded, key)
        if old is MISSING or _without_folders(new) == _without_folders(old):
            continue
        if max(len(repr(new)), len(repr(old))) > LONGEST:
            yield f"{key} is not what it was in the checkpoint"
        else:
            yield f"{key} = {new!r}, and was {old!r} in the checkpoint"


def _is_path(field: FieldInfo) -> bool:
    return PathText in get_args(field.annotation)


def _at(recorded: dict[str, Any], key: str) -> Any:
    """Returns the value of a key; None if its whole section was None."""
    found: Any = recorded
    for name in key.split("."):
        if found is None:
            return None
        if not isinstance(found, dict) or name not in found:
            return MISSING
        found = found[name]
    return found


def _without_folders(value: Any) -> Any:
    """Returns a value without the folders of a mixture, which may have moved."""
    if not isinstance(value, list):
        return value
    return [{k: v for k, v in item.items() if k != "folder"} if isinstance(item, dict) else item for item in value]
