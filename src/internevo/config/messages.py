"""Turns what pydantic says about a config into one line for each mistake, in the words of the config."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable, Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from .option import Section, field_extras, field_kinds, section_of
from .schema import Config

EXPECTED = {
    "string_type": "must be text; in a file, put it in quotes",
    "model_type": "must be a section with keys",
    "dict_type": "must be a section with keys",
    "tuple_type": "must be a list",
    "list_type": "must be a list",
    "finite_number": "must be a finite number",
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "must be a whole number"),
    **dict.fromkeys(("float_type", "float_parsing"), "must be a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "must be True or False"),
}
"""pydantic's kinds of errors -> what they mean in a config."""
BOUNDS = {"ge": "at least", "gt": "greater than", "le": "at most", "lt": "less than"}
KINDS = {str: "text", int: "a whole number", float: "a number", dict: "a section with keys"}


def describe(errors: Iterable[Any]) -> list[str]:
    """Returns one line for each mistake: the key, what is wrong, and for an unknown key what was probably meant."""
    lines: dict[str, str] = {}  # pydantic reports a value that is none of several types once for each of them
    for item in errors:
        path = _key_path(item["loc"])
        choice = _choice(item["loc"])
        if item["type"] == "extra_forbidden":
            lines |= {line: line for line in _unknown(path, item["input"])}
        elif choice:
            key, field = choice
            wanted = list(_wanted(field.annotation))
            said = f"must be {', '.join(wanted[:-1])} or {wanted[-1]}"
            lines.setdefault(key, f"{key}: {said} (got {reprlib.repr(item['input'])})")
        else:
            line = f"{'.'.join(path)}: {_wrong(item)}"
            lines[line] = line
    return list(lines.values())


def _wrong(item: Any) -> str:
    """Says what is wrong with a value."""
    if item["type"] == "missing":
        return "missing; it is required and has no default"
    bounds = [f"must be {words} {item['ctx'][name]}" for name, words in BOUNDS.items() if name in item.get("ctx", {})]
    message = EXPECTED.get(item["type"]) or "".join(bounds) or item["msg"].removeprefix("Value error, ")
    message = message.replace("Input should be", "must be")
    return f"{message[0].lower()}{message[1:]} (got {reprlib.repr(item['input'])})"


# Places --------------------------------------------------------------------------------------------------------------


def section_at(path: list[str]) -> type[Section] | None:
    """Returns the section of a path of names, or None. A number in the path is an index into a list."""
    section: type[Section] = Config
    for name in path:
        if not name.isdigit():
            inner = section_of(section.model_fields[name]) if name in section.model_fields else None
            if inner is None:
                return None
            section = inner
    return section


def _key_path(places: tuple[int | str, ...]) -> list[str]:
    """Returns the names and indices of a key. pydantic adds the type that it has tried, where several are possible."""
    path = [str(place) for place in places]
    for end in range(1, len(path)):
        section = section_at(path[: end - 1])
        field = section.model_fields.get(path[end - 1]) if section else None
        if field is not None and section_of(field) is None:
            names = field_kinds(field) - {NoneType} == {dict}
            return path[:end] + [part for part in path[end:] if names or part.isdigit()]
    return path


def _choice(places: tuple[int | str, ...]) -> tuple[str, FieldInfo] | None:
    """Returns the key and the field of an error in one of several types that a value may have; None for other errors."""
    path = [str(place) for place in places]
    for end in range(1, len(path)):
        section = section_at(path[: end - 1])
        field = section.model_fields.get(path[end - 1]) if section else None
        if field is not None and len(list(_parts(field.annotation))) > 1:
            return ".".join(path[:end]), field
    return None


def _parts(annotation: Any) -> Iterator[Any]:
    """Yields the types that a value may have, without None."""
    if get_origin(annotation) in (Union, UnionType):
        yield from (part for part in get_args(annotation) if part is not NoneType)
    else:
        yield annotation


def _wanted(annotation: Any) -> Iterator[str]:
    """Yields what a value may be, in words, for example "a number from 0 to 1"."""
    kind, inner = get_origin(annotation), get_args(annotation)
    if kind in (Union, UnionType):
        for part in inner:
            yield from _wanted(part)
    elif kind is Literal:
        yield from map(repr, inner)
    elif kind is Annotated:
        rules = getattr(inner[1], "metadata", ())
        limits = {name: getattr(rule, name) for rule in rules for name in BOUNDS if hasattr(rule, name)}
        both = f" from {limits['ge']} to {limits['le']}" if limits.keys() == {"ge", "le"} else ""
        yield from (f"{part}{both}" for part in _wanted(inner[0]))
    elif annotation is bool:
        yield from ("True", "False")
    elif annotation is NoneType:
        yield "None"
    else:
        yield KINDS.get(kind or annotation, "a list")


# Unknown keys --------------------------------------------------------------------------------------------------------


def _unknown(path: list[str], value: Any) -> Iterator[str]:
    """Yields a line for an unknown key. For a section of another framework, it is one for each key in it (optimizer.lr)."""
    near = _near(path, value)
    meant = section_at([*path[:-1], near]) if near else None
    if isinstance(value, dict) and not (meant and meant.model_fields.keys() & value.keys()) and any(map(_place, value)):
        for name in value:
            yield f"{'.'.join(path)}.{name}: unknown key{_meant(_place(name))}"
        return
    exact = _place(path[-1])
    if section_at(path[:-1]) is None:
        hint = ""
    elif len(path) == 1:
        hint = _meant(exact or near) or "; write the file's own names in capitals or with a leading underscore"
    else:
        hint = _meant(".".join([*path[:-1], near]) if near else exact)
    yield f"{'.'.join(path)}: unknown key{hint}"


def _meant(key: str | None) -> str:
    return f"; did you mean {key}?" if key else ""


def _near(path: list[str], value: Any) -> str | None:
    """Returns the key in the same section whose name is the most similar, if one is. Keys are not meant to be in a number."""
    section, names = section_at(path[:-1]), []
    for name, field in section.model_fields.items() if section else ():
        takes_keys = section_of(field) is not None or dict in field_kinds(field)
        # parallel.tensor = 4 is short for a section; no section of the top level has a short form.
        if value is None or takes_keys == isinstance(value, dict) or (takes_keys and len(path) > 1):
            names.append(name)
    return next(iter(difflib.get_close_matches(path[-1], names, n=1, cutoff=0.6)), None)


def _place(name: str) -> str | None:
    """Returns the dotted key with an effect, in any section, whose last part is ``name``; None if there is none."""
    return min((key for key in _keys(Config) if key.rpartition(".")[2] == name), key=lambda key: key.count("."), default=None)


def _keys(section: type[Section], path: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        inner = section_of(field)
        if not field_extras(field).get("ignored"):
            yield path + name
        if inner is not None and list not in field_kinds(field):
            yield from _keys(inner, f"{path}{name}.")
