"""``internevo generate``: prints the text after a prompt as it comes, or continues the prompts of a file in batches."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from ..data.encoding.formats import FormatName
from ..errors import DataError, UsageError
from ..inference.text import Prompt, TextModel, generate
from ..models.generate import Sampling
from ..text.chat import is_chat
from ..wording import counted


@dataclass(frozen=True)
class Options:
    """How text is generated."""

    max_new_tokens: int
    sampling: Sampling
    seed: int = 0
    stop: tuple[str, ...] = ()
    format: FormatName = "text"

    def arguments(self) -> dict[str, Any]:
        """Returns the arguments of ``internevo.generate`` and ``internevo.chat``."""
        rest = {"max_new_tokens": self.max_new_tokens, "seed": self.seed, "stop": self.stop}
        return {**asdict(self.sampling), **rest}


def print_text(folder: Path, tokenizer: Path | None, prompt: str, options: Options) -> None:
    """Prints what follows a prompt, piece by piece; in the format "text" after the prompt itself.

    Raises:
        UsageError: if there is no tokenizer, it is not the model's, or the prompt is too long for the model.
    """
    model = TextModel.open(folder, tokenizer)
    note_limit(model, model.prompt(prompt, options.format), options.max_new_tokens)
    if options.format == "text":
        print(prompt, end="", flush=True)
    for piece in generate(model, prompt, format=options.format, **options.arguments()):
        print(piece, end="", flush=True)
    print()


def note_limit(model: TextModel, prompt: Prompt, max_new_tokens: int) -> None:
    """Says so if fewer tokens can be generated than were asked for."""
    room = model.room(prompt)
    if room is not None and max_new_tokens > room:
        print(
            f"note: the answer has at most {counted(room, 'token')}, because the model's positions end there", file=sys.stderr
        )


def complete_file(
    folder: Path, tokenizer: Path | None, prompts: Path, output: Path | None, batch_size: int, options: Options
) -> None:
    """Continues each prompt of a file, in batches. Writes a line of JSON for each, in their order: what its line of the input
    has, and "text", what the model adds. Until all are there, the output is called NAME.partial; if the command ends before,
    that file has the texts of the first prompts. The fields of a chat ("tools", "documents", ...) are used as in training.

    The seed of line n, counted from 0, is the command's seed + n; so each text is what the command generates for it alone.

    Raises:
        UsageError: if the file cannot be read, a line has no prompt, a prompt is too long, or the output is there already.
    """
    rows = list(read_prompts(prompts, options.format))
    partial = None if output is None else output.with_name(f"{output.name}.partial")
    for path in (output, partial):
        if path is not None and path.exists():
            raise UsageError(f"{path} is there already; move it away, or give the name of a new file (--output)")
    model, encoded = TextModel.open(folder, tokenizer), []
    for number, row in rows:
        try:
            encoded.append(model.prompt(row.get("messages") or row["prompt"], options.format, options.stop, row))
        except (UsageError, DataError) as error:
            raise UsageError(f"{prompts}, line {number + 1}: {error}") from error
    size = model.batch_size(batch_size)
    with nullcontext(sys.stdout) if partial is None else _partial(partial) as file:
        for first in range(0, len(rows), size):
            places = range(first, min(first + size, len(rows)))
            seeds = [(options.seed + rows[place][0]) % 2**64 for place in places]
            texts = _complete(model, [encoded[place] for place in places], options, seeds)
            _write(file, [{**rows[place][1], "text": text} for place, text in zip(places, texts, strict=True)])
    if output is not None and partial is not None:
        _finish(partial, output)


def _finish(partial: Path, output: Path) -> None:
    """Gives a complete output its name, unless a file has appeared there meanwhile.

    Raises:
        UsageError: if one has.
    """
    try:
        os.link(partial, output)  # unlike a rename, it replaces nothing
    except OSError as error:
        if os.path.lexists(output):
            raise UsageError(f"{output} is there already: it has appeared meanwhile. The texts are in {partial}") from error
        partial.rename(output)  # a file system without links
    else:
        partial.unlink()


@contextmanager
def _partial(path: Path) -> Iterator[TextIO]:
    """Opens a new file for writing. If it cannot be finished, says so; if it is empty then, removes it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("x", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from error
    try:
        with file:
            yield file
    except BaseException:
        count = path.read_bytes().count(b"\n")
        if count:
            print(f"note: {path} has the texts of the first {counted(count, 'prompt')}", file=sys.stderr)
        else:
            path.unlink()
        raise


def _complete(model: TextModel, prompts: Sequence[Prompt], options: Options, seeds: Sequence[int]) -> list[str]:
    texts = [""] * len(prompts)
    for number, piece in model.stream(prompts, options.max_new_tokens, options.sampling, seeds):
        texts[number] += piece
    return texts


def _write(file: TextIO, rows: list[dict[str, Any]]) -> None:
    for row in rows:
        print(json.dumps(row, ensure_ascii=False), file=file)
    file.flush()


def read_prompts(path: Path, format: FormatName) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (number of the line from 0, {"prompt": text} or {"messages": [...]}, and what else the line has) of a file.

    A .jsonl file has an object on each line, and any other file a prompt on each line. Empty lines are left out.

    Raises:
        UsageError: if the file cannot be read, or a line has no prompt.
    """
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")  # and not at U+2028 and others, as splitlines does
    except OSError as error:
        raise UsageError(f"the prompts {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"the prompts {path} are not a text in UTF-8: {error}") from error
    found = [(number, line.removesuffix("\r")) for number, line in enumerate(lines) if line.strip()]
    if not found:
        raise UsageError(f"{path} has no prompt")
    for number, line in found:
        yield number, _parse(path, number, line, format) if path.suffix in (".jsonl", ".json") else {"prompt": line}


def _parse(path: Path, number: int, line: str, format: FormatName) -> dict[str, Any]:
    where = f"{path}, line {number + 1}"
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where} is not JSON: {error}") from error
    if isinstance(row, dict) and isinstance(row.get("prompt"), str):
        return {key: value for key, value in row.items() if key != "messages"}
    messages = row.get("messages") if isinstance(row, dict) else None
    if not is_chat(messages):
        raise UsageError(f'{where} has neither a "prompt", a text, nor "messages", a list of {{"role": ..., "content": ...}}')
    return row
