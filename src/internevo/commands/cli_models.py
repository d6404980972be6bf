"""The command line of the commands that use a model: ``generate``, ``chat`` and ``evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ..errors import UsageError
from .arguments import Overrides, parse_input, parse_path

Model = Annotated[
    Path, typer.Argument(parser=parse_input, metavar="MODEL", help="Run folder, checkpoint or Hugging Face folder.")
]
MaxNewTokens = Annotated[int, typer.Option(min=1, max=2**31, help="Maximum number of tokens to generate.")]
Temperature = Annotated[float, typer.Option(min=0, help="Divides the logits; 0: always the most likely token.")]
TopK = Annotated[int, typer.Option(min=0, help="Sample from the K most likely tokens; 0: from all.")]
TopP = Annotated[
    float,
    typer.Option(min=0, max=1, help="Sample from the most likely tokens with this total probability; 0: only the first."),
]
Seed = Annotated[int, typer.Option(min=-(2**63), max=2**64 - 1, help="Seed of the random numbers.")]
TokenizerPath = Annotated[
    Path | None, typer.Option(parser=parse_input, metavar="PATH", help="Path of the tokenizer (default: the one of the model).")
]
Stop = Annotated[list[str] | None, typer.Option(metavar="TEXT", help="End before this text; may be repeated.")]
Data = Annotated[
    Path | None,
    typer.Option(parser=parse_input, metavar="FOLDER", help="Tokenized data, on whose documents the loss is computed."),
]
Tasks = Annotated[
    str | None,
    typer.Option(metavar="NAMES", help="Tasks of lm-eval (the extra eval of this package), separated by commas."),
]
TaskFolder = Annotated[
    Path | None, typer.Option(parser=parse_input, metavar="FOLDER", help="Folder with task files of your own.")
]
Fewshot = Annotated[
    int | None, typer.Option(min=0, metavar="N", help="Examples in the prompts of tasks (default: as each task says).")
]
SeqLen = Annotated[
    int | None, typer.Option(min=1, max=2**31, help="Longest context in tokens (default: the model's, at most 4096).")
]
Stride = Annotated[int | None, typer.Option(min=1, help="Tokens between the windows of longer documents (default: --seq-len).")]
BatchSize = Annotated[
    int | None, typer.Option(min=1, max=2**20, help="Rows that go through the model at once (default: 8192 tokens).")
]
Limit = Annotated[int | None, typer.Option(min=1, help="Only the first N documents of each dataset type or task.", metavar="N")]
LayoutConfig = Annotated[
    Path | None,
    typer.Option(parser=parse_input, metavar="CONFIG", help="Config whose parallel section and model.dtype are used."),
]
DataTokenizer = Annotated[
    Path | None,
    typer.Option(
        parser=parse_input, metavar="PATH", help="Tokenizer, for bits per byte (default: the data's, or the model's)."
    ),
]


def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Option(help="Text to continue, or a question (see --format).")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            parser=parse_input,
            metavar="FILE",
            help="File of prompts: .jsonl (key prompt, or messages of a chat), or one a line.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(parser=parse_path, metavar="FILE.jsonl", help="With --prompts: file to write (default: standard output)."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="With --prompts: number of texts that are generated together.")] = 8,
    max_new_tokens: MaxNewTokens = 100,
    temperature: Temperature = 1.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    stop: Stop = None,
    tokenizer: TokenizerPath = None,
    format: Annotated[
        Literal["text", "alpaca", "chat"],
        typer.Option(help="What the prompt is: a text, or a question (alpaca, chat: as in the fine-tuning data)."),
    ] = "text",
) -> None:
    """Generate text after a prompt, or an answer to a question, and print it as it comes."""
    from ..models.generate import Sampling
    from . import generate as command

    if (prompt is None) == (prompts is None):
        raise UsageError("give either --prompt TEXT or --prompts FILE")
    if prompts is None and output is not None:
        raise UsageError("--output belongs to --prompts; the text of --prompt goes to standard output")
    options = command.Options(max_new_tokens, Sampling(temperature, top_k, top_p), seed, tuple(stop or ()), format)
    if prompt is not None:
        command.print_text(model, tokenizer, prompt, options)
    elif prompts is not None:
        command.complete_file(model, tokenizer, prompts, output, batch_size, options)


def chat(
    model: Model,
    system: Annotated[str | None, typer.Option(help="The system message: how the model is to answer.")] = None,
    max_new_tokens: MaxNewTokens = 1000,
    temperature: Temperature = 0.7,
    top_k: TopK = 0,
    top_p: TopP = 0.95,
    seed: Seed = 0,
    stop: Stop = None,
    tokenizer: TokenizerPath = None,
) -> None:
    """Talk with a model in the terminal. /reset forgets the talk, /exit or Ctrl-D ends it, Ctrl-C stops an answer."""
    from ..models.generate import Sampling
    from .chat import talk
    from .generate import Options

    talk(model, tokenizer, system, Options(max_new_tokens, Sampling(temperature, top_k, top_p), seed, tuple(stop or ())))


def evaluate(
    model: Model,
    overrides: Overrides = None,
    data: Data = None,
    tasks: Tasks = None,
    task_folder: TaskFolder = None,
    fewshot: Fewshot = None,
    chat_template: Annotated[bool, typer.Option("--chat-template", help="Apply the chat template in tasks.")] = False,
    seq_len: SeqLen = None,
    stride: Stride = None,
    batch_size: BatchSize = None,
    limit: Limit = None,
    config: LayoutConfig = None,
    nproc: Annotated[int | None, typer.Option(min=1, help="Number of local processes (default: one per GPU, or 1).")] = None,
    tokenizer: DataTokenizer = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compute loss, perplexity and bits per byte of a model on tokenized data, or evaluate it on tasks of lm-eval."""
    from .evaluate import Question, run

    names = tuple(name.strip() for name in (tasks or "").split(",") if name.strip())
    if not names and (task_folder is not None or fewshot is not None or chat_template):
        raise UsageError("--task-folder, --fewshot and --chat-template belong to --tasks")
    question = Question(
        model=model, data=data, tasks=names, task_folder=task_folder, fewshot=fewshot, chat_template=chat_template,
        tokenizer=tokenizer, seq_len=seq_len, stride=stride, batch_size=batch_size, limit=limit, config=config,
        overrides=tuple(overrides or ()), json=json,
    )  # fmt: skip
    raise typer.Exit(run(question, nproc))
