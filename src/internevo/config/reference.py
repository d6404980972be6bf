"""Generates the documentation's page of all config keys from the schema."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from .messages import BOUNDS
from .option import Section, field_extras, section_of
from .schema import Config

HEAD = """# Config reference

```bash
internevo config configs/demo.py
```

prints a config with all defaults. This page lists every key, section by section. A key with *no effect* is known from
InternEvo's own configs: it is accepted, and the run prints a line that lists such keys; `internevo config` says why of each.
A key that is *not available yet* may be in a config too, but `internevo train` refuses to start if its value needs the
missing feature.
No number may be infinite or NaN; 0 or `None` mean "no limit" where the table says so. (Only `ckpt.checkpoint_every` and
`ckpt.oss_snapshot_freq` may be infinite, as in InternEvo's files: the same as 0.) `~` in a path is the home folder. Where
a list of texts is meant, one text stands for a list with nothing else.
"""


def write(path: Path) -> None:
    """Writes the page, but only if it has changed, because `mkdocs serve` builds the site again after every write."""
    text = HEAD + "".join(_section("top level", Config, ""))
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def _section(title: str, section: type[Section], path: str) -> Iterator[str]:
    fields = section.model_fields
    yield f"\n## {title}\n\n{section.__doc__}\n\n| key | type | default | meaning |\n|---|---|---|---|\n"
    for name, field in fields.items():
        if section_of(field) is None or field.default is None:  # a section that may be left out has a row, too
            yield f"| `{path}{name}` | {_type(field)} | {_default(field)} | {_meaning(field)} |\n"
    for name, field in fields.items():
        inner = section_of(field)
        if inner is not None:
            yield from _section(f"`{path}{name}`", inner, f"{path}{name}.")


def _type(field: FieldInfo) -> str:
    return _words(field.annotation)


def _words(annotation: Any) -> str:
    """Describes a type, for example "`int` or `None`" or "`'mtp'` or `'isp'`". (In a table, "|" would have to be escaped.)"""
    kind, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if kind is typing.Literal:
        return " or ".join(f"`{value!r}`" for value in inner)
    if kind in (typing.Union, types.UnionType):
        return " or ".join(_words(part) for part in inner)
    if kind is typing.Annotated:
        return _words(inner[0])
    if annotation is types.NoneType:
        return "`None`"
    return f"`{_plain(annotation)}`"


def _plain(annotation: Any) -> str:
    """Returns a type as Python writes it, without the bounds of its values."""
    kind, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if kind is typing.Annotated:
        return _plain(inner[0])
    if kind is None or annotation is Ellipsis:
        if isinstance(annotation, type) and issubclass(annotation, Section):
            return "section"
        return "..." if annotation is Ellipsis else getattr(annotation, "__name__", str(annotation))
    return f"{kind.__name__}[{', '.join(map(_plain, inner))}]"


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined or field.is_required():
        return "**required**"
    return f"`{field.default!r}`"


def _meaning(field: FieldInfo) -> str:
    extras = field_extras(field)
    text = (field.description or "").replace("|", "&#124;")
    bounds = [
        f"{words} {getattr(limit, name)}" for limit in field.metadata for name, words in BOUNDS.items() if hasattr(limit, name)
    ]
    if bounds:
        text += f" It must be {' and '.join(bounds)}."
    if extras.get("unit"):
        text += f" Unit: {extras['unit']}."
    if extras.get("needs"):
        text += f" It has no effect without `{extras['needs']}`."
    if extras.get("unless"):
        text += f" It has no effect with `{extras['unless']}`, which replaces it."
    if extras.get("ignored"):
        text += f" *No effect: {extras['ignored']}.*"
    if extras.get("not_available"):
        text += f" *Not available yet: {extras['not_available']}.*"
    return text
