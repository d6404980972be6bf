"""``internevo chat``: a talk with a model in the terminal."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import replace
from pathlib import Path

from ..errors import DataError, UsageError
from ..inference.text import TextModel, chat
from ..text.chat import ChatTemplate, Messages
from .generate import Options

HELP = "/reset forgets the talk, /exit or Ctrl-D ends it; Ctrl-C stops an answer"


def talk(folder: Path, tokenizer: Path | None, system: str | None, options: Options) -> None:
    """Reads messages from standard input, and prints the answers piece by piece. The model sees the whole talk.

    Args:
        system: the first message: how the model is to answer.

    Raises:
        UsageError: if the model has no tokenizer or no chat template.
    """
    model = TextModel.open(folder, tokenizer)
    ChatTemplate.load(model.tokenizer)
    start: Messages = [] if system is None else [{"role": "system", "content": system}]
    model.prompt([*start, {"role": "user", "content": "?"}])  # fails now if the template does not take a system message
    print(f"{folder}: {HELP}", file=sys.stderr)
    _ = model.model
    messages, asked = list(start), 0
    while (line := _read()) is not None:
        if line == "/exit":
            return
        if line == "/reset":
            messages = list(start)
            print("the talk is forgotten", file=sys.stderr)
        elif line.startswith("/") and " " not in line:
            print(f"there is no command {line}; {HELP}", file=sys.stderr)
        elif line:
            messages.append({"role": "user", "content": line})
            if not _answer(model, messages, options, options.seed + asked):
                messages.pop()
            asked += 1


def _read() -> str | None:
    """Reads a line; None at the end of the input. Ctrl-C begins a new line."""
    while True:
        try:
            return input(">>> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return None
        except KeyboardInterrupt:
            print(f"\n{HELP}", file=sys.stderr)


def _answer(model: TextModel, messages: Messages, options: Options, seed: int) -> bool:
    """Prints the answer to the last message, and appends it. Returns False if the message cannot be answered."""
    try:
        pieces = chat(model, messages, **replace(options, seed=seed % 2**64).arguments())
    except (UsageError, DataError) as error:
        print(f"error: {error}; /reset forgets the talk so far", file=sys.stderr)
        return False
    text = ""
    with contextlib.suppress(KeyboardInterrupt):  # keeps what has been said
        for piece in pieces:
            text += piece
            print(piece, end="", flush=True)
    print()
    messages.append({"role": "assistant", "content": text})
    return True
