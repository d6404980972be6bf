"""The config reference of the documentation, made from the schema."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from pathlib import Path

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from .option import Section, marks, section_of
from .schema import Config

HEAD = """# Config reference

```bash
internevo config configs/demo.py
```

prints a config with every default written out. Every key of the schema is below, by section. A key with *no effect* is known
from InternEvo and accepted with one line that says so; a value that asks for something *not available yet* validates, and a
run that needs it stops and says so.
"""


def write(path: Path) -> None:
    """Writes the page, if it differs (so that a watching build does not build for ever)."""
    text = HEAD + "".join(_section("top level", Config, ""))
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def _section(title: str, section: type[Section], path: str) -> Iterator[str]:
    fields = section.model_fields
    yield f"\n## {title}\n\n{section.__doc__}\n\n| key | type | default | meaning |\n|---|---|---|---|\n"
    for name, field in fields.items():
        if section_of(field) is None:
            yield f"| `{path}{name}` | {_type(field)} | {_default(field)} | {_meaning(field)} |\n"
    for name, field in fields.items():
        inner = section_of(field)
        if inner is not None:
            yield from _section(f"`{path}{name}`", inner, f"{path}{name}.")


def _type(field: FieldInfo) -> str:
    annotation = field.annotation
    text = annotation.__name__ if isinstance(annotation, type) and not typing.get_args(annotation) else str(annotation)
    for noise in ("typing.", "NoneType", "Literal"):
        text = text.replace(noise, {"NoneType": "None"}.get(noise, ""))
    return "`" + text.replace("|", "\\|") + "`"


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined or field.is_required():
        return "**required**"
    return f"`{field.default!r}`"


def _meaning(field: FieldInfo) -> str:
    kinds = marks(field)
    text = (field.description or "").replace("|", "\\|")
    if kinds.get("unit"):
        text += f" Unit: {kinds['unit']}."
    if kinds.get("ignored"):
        text += f" *No effect: {kinds['ignored']}.*"
    if kinds.get("later"):
        text += f" *Not available yet: {kinds['later']}.*"
    return text
