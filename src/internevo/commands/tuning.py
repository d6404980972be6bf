"""The arguments of the commands ``tokenize`` and ``finetune``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from .arguments import parse_input, parse_path


def tokenize(
    inputs: Annotated[list[Path], typer.Argument(parser=parse_input, metavar="INPUT", help="Files, or folders with files.")],
    output: Annotated[Path, typer.Option(parser=parse_path, metavar="FOLDER", help="Folder for the tokenized data.")],
    tokenizer: Annotated[
        Path | None,
        typer.Option(parser=parse_input, metavar="PATH", help="Tokenizer folder, tokenizer.json or SentencePiece .model."),
    ] = None,
    train_tokenizer: Annotated[Literal["bpe"] | None, typer.Option(help="Train a tokenizer on the input instead.")] = None,
    vocab_size: Annotated[int | None, typer.Option(min=1, help="Vocabulary size of the tokenizer to train.")] = None,
    format: Annotated[
        Literal["text", "json", "jsonl", "csv", "parquet", "arrow", "alpaca", "chat"] | None,
        typer.Option(help="Format of the files (default: by suffix); alpaca: instructions; chat: conversations."),
    ] = None,
    text_key: Annotated[str | None, typer.Option(help="Key or column with the text (default: content, then text).")] = None,
    pattern: Annotated[str | None, typer.Option(help="Which files in a folder to read, for example '*.py'.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Name of a folder to leave out; may be repeated.")] = None,
    type: Annotated[str, typer.Option(help="Dataset type, a folder in the output; losses are reported per type.")] = "en",
    valid_ratio: Annotated[float, typer.Option(min=0, max=1, help="Share of the documents for validation.")] = 0.0,
    workers: Annotated[int | None, typer.Option(min=1, help="Number of processes (default: number of cores).")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace tokenized data in the output folder.")] = False,
    on_error: Annotated[
        Literal["stop", "skip"], typer.Option(help="If a document cannot be read: stop, or leave it out and print a line.")
    ] = "stop",
) -> None:
    """Tokenize text. Writes OUTPUT/TYPE, or with --valid-ratio OUTPUT/train/TYPE and OUTPUT/valid/TYPE."""
    from .tokenize import run

    run(
        inputs, output, tokenizer=tokenizer, train_tokenizer=train_tokenizer, vocab_size=vocab_size, format=format,
        text_key=text_key, pattern=pattern, exclude=tuple(exclude or ()), dataset_type=type, valid_ratio=valid_ratio,
        workers=workers, overwrite=overwrite, on_error=on_error,
    )  # fmt: skip
