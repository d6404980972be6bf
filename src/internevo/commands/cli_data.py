"""The command line of the commands that read raw data: ``tokenize`` and ``finetune``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from .arguments import Overrides, parse_input, parse_path


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
    template_date: Annotated[
        str | None,
        typer.Option(metavar="YYYY-MM-DD", help="What the template of chats takes for today (default: always the same day)."),
    ] = None,
) -> None:
    """Tokenize text. Writes OUTPUT/TYPE, or with --valid-ratio OUTPUT/train/TYPE and OUTPUT/valid/TYPE."""
    from .tokenize import run

    run(
        inputs, output, tokenizer=tokenizer, train_tokenizer=train_tokenizer, vocab_size=vocab_size, format=format,
        text_key=text_key, pattern=pattern, exclude=tuple(exclude or ()), dataset_type=type, valid_ratio=valid_ratio,
        workers=workers, overwrite=overwrite, on_error=on_error, template_date=template_date,
    )  # fmt: skip


def finetune(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hugging Face folder, or its name on the hub (owner/name).")],
    data: Annotated[
        str,
        typer.Argument(metavar="DATA", help="Chats, instructions or texts: a file, a folder, or a name on the hub."),
    ],
    output: Annotated[Path, typer.Option(parser=parse_path, metavar="RUN", help="Run folder, for all that is written.")],
    overrides: Overrides = None,
    lora: Annotated[
        int | None, typer.Option(min=1, metavar="RANK", help="Train adapters of this rank (LoRA) and not all weights.")
    ] = None,
    format: Annotated[
        Literal["auto", "chat", "alpaca", "text"], typer.Option(help="Format of the documents (auto: by their fields).")
    ] = "auto",
    text_key: Annotated[str | None, typer.Option(help="Field with the text, or with the messages of a chat.")] = None,
    subset: Annotated[str | None, typer.Option(help="Sub-folder of the dataset.")] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(parser=parse_input, metavar="PATH", help="Tokenizer (default: the model's).")
    ] = None,
    chat_template: Annotated[
        Path | None, typer.Option(parser=parse_input, metavar="FILE", help="Chat template (default: the tokenizer's).")
    ] = None,
    epochs: Annotated[float | None, typer.Option(min=0.001, help="Passes over the data (default: 3; 1 for much data).")] = None,
    lr: Annotated[float | None, typer.Option(min=0, help="Highest learning rate (default: by the model's size).")] = None,
    seq_len: Annotated[int | None, typer.Option(min=1, help="Tokens of a row (default: by the data and the model).")] = None,
    valid_ratio: Annotated[
        float | None, typer.Option(min=0, max=0.9, help="Share of the documents to evaluate on (default: a tenth, up to 1000).")
    ] = None,
    on_error: Annotated[
        Literal["stop", "skip"], typer.Option(help="If a document cannot be read: stop, or leave it out and print a line.")
    ] = "stop",
    nproc: Annotated[int | None, typer.Option(min=1, help="Number of local processes (default: one per GPU, or 1).")] = None,
) -> None:
    """Fine-tune a pretrained model on your data, and export it. The same command goes on after it was stopped."""
    from .finetune import finetune as run
    from .finetune_config import Options

    options = Options(
        os.path.expanduser(model), os.path.expanduser(data), format, lora, text_key, subset,
        None if tokenizer is None else str(tokenizer), None if chat_template is None else str(chat_template),
        epochs, lr, seq_len, valid_ratio, on_error, list(overrides or []),
    )  # fmt: skip
    raise typer.Exit(run(options, output, nproc))
