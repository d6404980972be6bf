"""How a config field is declared: its default, its meaning, and whether it has an effect in this version."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo

REQUIRED: Any = ...
DTYPES = {
    "torch.float32": "float32",
    "torch.float": "float32",
    "torch.tf32": "tf32",
    "torch.bfloat16": "bfloat16",
    "torch.float16": "float16",
    "torch.half": "float16",
    "fp32": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
}


class Section(BaseModel):
    """A frozen group of options that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), validate_default=False)


def option(
    default: Any,
    doc: str,
    *,
    unit: str = "",
    ignored: str = "",
    later: str = "",
    neutral: tuple[Any, ...] = (),
    **bounds: Any,
) -> Any:
    """Declares one option.

    Args:
        default: its default, or ``REQUIRED``.
        doc: what it means, for the reference and the error messages.
        unit: of the value ("tokens", "steps").
        ignored: why the key, known from InternEvo, has no effect here; setting it is accepted with one notice.
        later: what a value other than the default (or one of ``neutral``) asks for that does not exist yet;
            it validates, and a run that needs it stops with this text.
        bounds: pydantic's own constraints (``ge``, ``gt``, ``le``).
    """
    extra: dict[str, Any] = {"unit": unit, "ignored": ignored, "later": later}
    info: FieldInfo = Field(default, description=doc, json_schema_extra=extra, **bounds)
    info.metadata.append(Neutral(neutral))
    return info


class Neutral:
    """Values besides the default that need nothing which is not there yet."""

    def __init__(self, values: tuple[Any, ...]) -> None:
        self.values = values


def walk(section: Section, path: str = "") -> Iterator[tuple[str, FieldInfo, Any, bool]]:
    """Yields (dotted key, field, value, set by the user) for every option below ``section``."""
    for name, field in type(section).model_fields.items():
        key, value = f"{path}{name}", getattr(section, name)
        given = name in section.model_fields_set
        if isinstance(value, Section):
            yield from walk(value, key + ".")
        else:
            yield key, field, value, given


def section_of(field: FieldInfo) -> type[Section] | None:
    """The section that a field holds, if it holds one."""
    options = (field.annotation, *get_args(field.annotation))
    for candidate in (*options, *(inner for option in options for inner in get_args(option))):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None


def marks(field: FieldInfo) -> dict[str, str]:
    """The marks ``unit``, ``ignored`` and ``later`` of a field."""
    extra = field.json_schema_extra
    return {k: str(v) for k, v in extra.items()} if isinstance(extra, dict) else {}


def notices(section: Section) -> list[str]:
    """One line for each key that was set and has no effect here."""
    return [
        f"{key} has no effect here: {marks(field)['ignored']}"
        for key, field, _, given in walk(section)
        if given and marks(field).get("ignored")
    ]


def unavailable(section: Section) -> list[str]:
    """One line for each value that asks for something which does not exist yet."""
    lines = []
    for key, field, value, _ in walk(section):
        what = marks(field).get("later")
        neutral = next((m.values for m in field.metadata if isinstance(m, Neutral)), ())
        if what and value != field.get_default(call_default_factory=True) and value not in neutral:
            lines.append(f"not available yet: {what} ({key} = {value!r})")
    return lines


def dtype_name(value: Any) -> str:
    """PyTorch's name of a dtype however it is written: "torch.half" -> "float16"."""
    return DTYPES.get(str(value), str(value).removeprefix("torch."))
