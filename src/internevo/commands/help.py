"""How the help of a command reads, ``--version``, and completion in a shell."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable, Iterator
from typing import Any, Literal

import typer
from typer.core import TyperArgument, TyperCommand, TyperGroup

from .. import __version__

KINDS = {"<int>": "N", "<int range>": "N", "<float>": "X", "<float range>": "X", "<str>": "TEXT", "<list[str]>": "TEXT"}
"""What typer writes for the value of an option -> what is written here."""
LONGEST = 1000
"""The longest sentence about a command, in characters."""
COMPLETE = "_INTERNEVO_COMPLETE"
"""Environment variable with which a shell asks ``internevo`` for completions; typer makes it from the name of the program."""


class App(typer.Typer):
    """The program. Its commands have ``Command`` as their class."""

    def command(self, name: str | None = None, *, cls: type[TyperCommand] | None = None, **more: Any) -> Callable[[Any], Any]:
        """As typer's."""
        return super().command(name, cls=cls or Command, **more)


class Group(TyperGroup):
    """The program, whose help has the first sentence of each command: whole, in as many lines as it takes."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Writes the commands with what they do. (typer cuts it to one line.)"""
        found = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        with formatter.section("Commands"):
            formatter.write_dl([(name, of.get_short_help_str(LONGEST)) for name, of in found if of and not of.hidden])


class Command(TyperCommand):
    """A command whose help has no brackets but those around what may be left out."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Returns the usage, such as [OPTIONS] CONFIG [KEY.PATH=VALUE...]."""
        arguments = [param for param in self.get_params(ctx) if isinstance(param, TyperArgument)]
        return ["[OPTIONS]", *(name_of(a) if a.required else f"[{name_of(a)}]" for a in arguments)]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Writes the arguments and the options with their help."""
        rows: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is None:
                continue
            if isinstance(param, TyperArgument):
                rows["Arguments"].append((name_of(param), plain_help(record[1], required=False)))
            else:
                is_flag = getattr(param, "is_flag", False)
                rows["Options"].append((plain_name(record[0]), plain_help(record[1], default=not is_flag)))
        for title, of in rows.items():
            if of:
                with formatter.section(title):
                    formatter.write_dl(of)


def name_of(argument: TyperArgument) -> str:
    """Returns the name of an argument; with three dots, if it can be given several times."""
    name = (argument.metavar or argument.name or "").strip("[].")
    return f"{name}..." if argument.nargs != 1 else name


def plain_name(name: str) -> str:
    """Returns an option with the kind of its value: --nproc N, --to hf|internevo."""
    for theirs, ours in KINDS.items():
        name = name.replace(theirs, ours)
    return re.sub(r"<(.*)>", r"\1", name)


def plain_help(text: str, required: bool = True, default: bool = True) -> str:
    """Returns a help with "(default: 8)" instead of "[default: 8; x>=1]".

    Args:
        required, default: whether to say that it is required, and what its default is.
    """
    found = re.search(r"\s*\[((?:default: |required|-?[\d.e+]*<?=?x)[^\[\]]*)\]$", text)
    if found is None:
        return text
    facts = list[str]()
    for fact in found[1].split("; "):
        if (fact == "required" and required) or (fact.startswith("default: ") and default):
            facts.append(fact)
        elif bounds := re.fullmatch(r"(?:(.+)<=)?x(?:<=(.+)|>=(.+))?", fact):
            facts += _range(*bounds.groups())
    return text[: found.start()] + (f" ({', '.join(facts)})" if facts else "")


def _range(low: str | None, high: str | None, least: str | None) -> Iterator[str]:
    """Yields the range of a number in words, unless nobody would go beyond it."""
    low = low or least
    if high is not None and float(high) <= 1000:
        yield f"{low} to {high}" if low is not None else f"at most {high}"
    elif low is not None and float(low) > 1:
        yield f"at least {low}"


def print_version(wanted: bool) -> None:
    """Prints the versions of this program, PyTorch and Python, and ends: what a report of a bug needs. Is ``--version``."""
    if wanted:
        from importlib.metadata import PackageNotFoundError, version  # takes a fifth of the time of --help to import

        try:
            torch = version("torch")
        except PackageNotFoundError:
            torch = "is missing"
        print(f"internevo {__version__} (torch {torch}, Python {platform.python_version()})")
        raise typer.Exit


def completion_script(shell: Literal["bash", "zsh", "fish"]) -> str:
    """Returns the lines that a shell must run to complete the commands, options and config keys of ``internevo``."""
    from typer import completion

    script = str(completion.get_completion_script(prog_name="internevo", complete_var=COMPLETE, shell=shell))
    # A key goes on after its dot or its equals sign.
    return script.replace("    return 0\n", "    [[ ${COMPREPLY[0]} == *[.=] ]] && compopt -o nospace\n    return 0\n")


def prepare_completion() -> None:
    """Must be called before the program runs. If a shell asks for completions, typer then knows how the shell is answered."""
    if COMPLETE in os.environ:
        from typer import completion

        completion.completion_init()


def complete_override(incomplete: str) -> Iterator[str]:
    """Yields the config keys that continue a text, for the shell: sections with a dot, values with an equals sign."""
    from ..config.option import section_of
    from ..config.schema import Config

    *sections, begun = incomplete.split(".")
    section: Any = Config
    for name in sections:
        field = section.model_fields.get(name) if section is not None else None
        section = section_of(field) if field is not None else None
    for name, field in section.model_fields.items() if section is not None else ():
        if name.startswith(begun):
            yield ".".join([*sections, name]) + ("=" if section_of(field) is None else ".")
