"""Declares config fields: the default, the meaning, and whether the field has an effect in this version."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

from ..wording import counted

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
LARGEST_INT = 2**63 - 1
LARGEST_FLOAT = 3.4e38
"""The largest number in fp32, in which tensors compute."""
MAX_SIZE = 2**31 - 1
"""The largest size of a tensor's dimension: positions and document boundaries are int32."""


MAX_EXPERTS = 65_536
"""The largest number of experts in a layer."""
KERNELS = "the fastest kernel for the device is chosen in one place (internevo/ops)"
"""Why an option that names a kernel has no effect."""


def _path(text: str) -> str:
    if not text:
        raise ValueError("must not be empty; leave the key out")
    if "\0" in text:
        raise ValueError("must not have a null character in it")
    return os.path.expanduser(text)


PathText = Annotated[str, AfterValidator(_path)]
"""A file or a folder. ``~`` is the user's home folder."""


class Section(BaseModel):
    """A group of options. Its values cannot be changed, and unknown keys are errors. No number may be infinite or NaN."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), validate_default=False, allow_inf_nan=False)

    @field_validator("*", mode="wrap")
    @classmethod
    def _number(cls, value: Any, check: Callable[[Any], Any], info: ValidationInfo) -> Any:
        """Python takes True for 1, and has numbers that no tensor can have. A text stands for a list with nothing else."""
        field = cls.model_fields[info.field_name or ""]
        kinds = field_kinds(field)
        if isinstance(value, str) and holds_texts(field):
            value = [value]
        if isinstance(value, bool) and bool not in kinds and kinds & {int, float}:
            raise ValueError("must be a number")
        if isinstance(value, list | tuple) and any(isinstance(item, bool) for item in value):  # no option is a list of them
            raise ValueError("must have no True or False in it")
        value = check(value)
        if isinstance(value, int) and abs(value) > LARGEST_INT:
            raise ValueError(f"must be at most {LARGEST_INT} (2**63 - 1)")
        if isinstance(value, float) and abs(value) > LARGEST_FLOAT:
            raise ValueError(f"must be at most {LARGEST_FLOAT}, the largest number in fp32")
        return value


def option(
    default: Any,
    doc: str,
    *,
    unit: str = "",
    ignored: str = "",
    needs: str = "",
    unless: str = "",
    not_available: str = "",
    supported: tuple[Any, ...] = (),
    **bounds: Any,
) -> Any:
    """Declares one option.

    Args:
        default: the default value, or ``REQUIRED``.
        doc: what the option means; printed in the config reference.
        unit: the unit of the value, for example "tokens" or "steps".
        ignored: for a key of InternEvo that has no effect here: the reason. A config may set it, and a notice is printed.
        needs: another key without which this one has no effect, or "KEY=VALUE" if that must have a certain value (as Python
            writes it). If a config sets only this one, a notice is printed.
        unless: another key that replaces this one. If a config sets both, a notice is printed.
        not_available: for an option that is not implemented yet: the name of the missing feature. A value other than the
            default and ``supported`` is valid, but training does not start with it, and the message has this name.
        supported: with ``not_available``: values that work although they are not the default.
        bounds: constraints of pydantic's ``Field`` (``ge``, ``gt``, ``le``).
    """
    extra: dict[str, Any] = {"unit": unit, "ignored": ignored, "needs": needs, "unless": unless, "not_available": not_available}
    info: FieldInfo = Field(default, description=doc, json_schema_extra=extra, **bounds)
    info.metadata.append(SupportedValues(supported))
    return info


class SupportedValues:
    """The values of an option that work although the option's feature is not available yet; the default always works."""

    def __init__(self, values: tuple[Any, ...]) -> None:
        self.values = values


def walk(section: Section, path: str = "") -> Iterator[tuple[str, FieldInfo, Any, bool]]:
    """Yields (dotted key, field, value, whether the user has set it) for every option in ``section`` and in its sections."""
    for name, field in type(section).model_fields.items():
        key, value = f"{path}{name}", getattr(section, name)
        given = name in section.model_fields_set
        if isinstance(value, Section):
            yield from walk(value, key + ".")
        else:
            yield key, field, value, given


def field_kinds(field: FieldInfo) -> set[Any]:
    """Returns the types of the values that a field may have: str, int, NoneType, ...; str for names to choose from."""

    def kinds(annotation: Any) -> Iterator[Any]:
        origin = get_origin(annotation)
        if origin in (Union, UnionType):
            for part in get_args(annotation):
                yield from kinds(part)
        elif origin is Annotated:
            yield from kinds(get_args(annotation)[0])
        elif origin is Literal:
            yield from map(type, get_args(annotation))
        else:
            yield origin or annotation

    return set(kinds(field.annotation))


def holds_texts(field: FieldInfo) -> bool:
    """Whether a field is a list of texts, for which one text may stand."""
    parts = (field.annotation, *get_args(field.annotation))
    items = [get_args(part)[0] for part in parts if get_origin(part) in (list, tuple)]
    return any(item is str or get_origin(item) is Literal for item in items) and str not in field_kinds(field)


def section_of(field: FieldInfo) -> type[Section] | None:
    """Returns the section class of a field that holds a section or a list of sections; None for other fields."""
    options = (field.annotation, *get_args(field.annotation))
    for candidate in (*options, *(inner for option in options for inner in get_args(option))):
        if isinstance(candidate, type) and issubclass(candidate, Section):
            return candidate
    return None


def field_extras(field: FieldInfo) -> dict[str, str]:
    """Returns what ``option`` was given as ``unit``, ``ignored``, ``needs``, ``unless`` and ``not_available`` for a field."""
    extra = field.json_schema_extra
    return {k: str(v) for k, v in extra.items()} if isinstance(extra, dict) else {}


def notices(section: Section, short: bool = False) -> list[str]:
    """Returns one line for each key that the user has set and that has no effect here.

    Args:
        short: keys of InternEvo that never have an effect share one line, without the reasons: its configs have many.
    """
    ignored, options = _ignored_keys(section), {key: (field, value) for key, field, value, _ in walk(section)}
    if short and len(ignored) > 1:
        lines = [f"{counted(len(ignored), 'key')} have no effect here (`internevo config` says why): {', '.join(ignored)}"]
    else:
        lines = [f"{key} has no effect here: {reason}" for key, reason in ignored.items()]
    for key, field, value, given in walk(section):
        needs, unless = (field_extras(field).get(name) for name in ("needs", "unless"))
        if not given or key in ignored or _is_default(field, value):
            continue
        if needs and not _is_met(needs, options):
            lines.append(f"{key} has no effect without {needs}")
        elif unless and _is_met(unless, options):
            lines.append(f"{key} has no effect with {unless}, which replaces it")
    return lines


def _ignored_keys(section: Section) -> dict[str, str]:
    """Returns key -> reason of the keys that the user has set and that never have an effect here.

    In the resolved config of a run all keys are set; those with their defaults are not the user's.
    """
    options = [(key, field, value, given, field_extras(field).get("ignored")) for key, field, value, given in walk(section)]
    whole = all(given or reason for _, _, _, given, reason in options)
    return {
        key: reason
        for key, field, value, given, reason in options
        if given and reason and not (whole and _is_default(field, value))
    }


def _is_met(needs: str, options: dict[str, tuple[FieldInfo, Any]]) -> bool:
    """Whether the options are as the ``needs`` of another option says."""
    key, _, wanted = needs.partition("=")
    field, value = options[key]
    return repr(value) == wanted if wanted else not _is_default(field, value)


def _is_default(field: FieldInfo, value: Any) -> bool:
    return bool(value == field.get_default(call_default_factory=True))


def unavailable(section: Section) -> list[str]:
    """Returns one line for each value that asks for a feature which is not available yet."""
    lines = []
    for key, field, value, _ in walk(section):
        feature = field_extras(field).get("not_available")
        supported = next((m.values for m in field.metadata if isinstance(m, SupportedValues)), ())
        if feature and not _is_default(field, value) and value not in supported:
            lines.append(f"not available yet: {feature} ({key} = {value!r})")
    return lines


def listed(value: Any) -> list[Any]:
    """Returns the values of a list. A text stands for a list with nothing else.

    Raises:
        ValueError: if it is neither.
    """
    if not isinstance(value, str | list | tuple | set):
        raise ValueError("must be a list")
    return [value] if isinstance(value, str) else list(value)


def dtype_name(value: Any) -> str:
    """Returns PyTorch's short name of a dtype, for example "float16" for "torch.half" or "fp16"."""
    return DTYPES.get(str(value), str(value).removeprefix("torch."))
