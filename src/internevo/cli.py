"""The command line. Each command parses its arguments and calls ``commands/``. PyTorch is imported only where it is needed.

The commands for configs, runs and checkpoints are here; ``commands/cli_data.py`` has those that read raw data, and
``commands/cli_models.py`` those that use a model.
"""

from __future__ import annotations

import os
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer

from .commands import cli_data, cli_models
from .commands.arguments import PROFILING, ConfigFile, Overrides, parse_input, parse_path, parse_size, parse_tokens
from .commands.help import App, Group, completion_script, prepare_completion, print_version
from .commands.printing import describe_error, print_anything
from .errors import InternEvoError, UsageError

DEBUG = "INTERNEVO_DEBUG"
"""Environment variable that passes --debug on to the processes that a command starts."""

app = App(
    name="internevo",
    cls=Group,
    help="Pre-train and fine-tune large language models, from a laptop to thousands of GPUs. --debug shows tracebacks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _epilog(example: str) -> str:
    return f"Example: {example}"


@app.callback()
def program(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Takes the options that belong to no command. Its help is that of the app."""


@app.command(epilog=_epilog("internevo train configs/demo.py data.total_steps=100 --nproc 2"))
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    nproc: Annotated[int | None, typer.Option(min=1, help="Number of local processes (default: one per GPU, or 1).")] = None,
    profiling: Annotated[bool, typer.Option("--profiling", help="The same as monitor.memory=true monitor.trace=true.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Do not train: count the memory and the collectives of one rank of --world-size.")
    ] = False,
    world_size: Annotated[int | None, typer.Option(min=1, max=2**20, help="Number of ranks of a dry run.", metavar="N")] = None,
    rank: Annotated[int | None, typer.Option(min=0, help="The rank that a dry run is of (default: 0).", metavar="R")] = None,
) -> None:
    """Train a model. Under torchrun or srun, this process is one rank of the run; otherwise it starts the processes itself."""
    from .commands import train as command

    if not dry_run and (world_size, rank) != (None, None):
        raise UsageError("--world-size and --rank belong to --dry-run; a run has as many ranks as processes (--nproc)")
    if not dry_run:
        raise typer.Exit(command.train(config, [*(overrides or []), *(PROFILING if profiling else ())], nproc))
    if world_size is None or nproc is not None or profiling:
        raise UsageError("--dry-run needs --world-size N, the number of ranks, and no --nproc or --profiling: it only counts")
    command.dry_run(config, overrides or [], world_size, rank or 0)


@app.command(
    "config",
    epilog=_epilog("internevo config configs/7B_internlm2.py --world-size 8")
    + " \n\n"
    + _epilog("internevo config --from-hf llama/ > mine.py"),
)
def config_(
    config: Annotated[
        Path | None, typer.Argument(parser=parse_input, metavar="CONFIG", help="Config file: .py, .yaml, .toml or .json.")
    ] = None,
    overrides: Overrides = None,
    world_size: Annotated[int | None, typer.Option(min=1, help="Also print the layout on N processes.", metavar="N")] = None,
    per_node: Annotated[int, typer.Option(min=1, help="Processes per node, for the layout.")] = 8,
    everything: Annotated[
        bool, typer.Option("--all", help="Print the whole config as JSON; also if the output is not a terminal.")
    ] = False,
    from_hf: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Print a new config that starts from a Hugging Face folder or name (owner/name)."),
    ] = None,
) -> None:
    """Check a config, and print the model, the layout and what differs from the defaults."""
    from .commands.config import show
    from .commands.config_from_hf import from_hf as new_config

    if from_hf is not None and config is not None:
        raise UsageError("--from-hf prints a new config: leave out CONFIG")
    if from_hf is not None:
        print(new_config(from_hf), end="")
    elif config is None:
        raise UsageError("give a config file, or --from-hf MODEL for a new one")
    else:
        show(config, overrides or [], world_size, per_node, everything or None)


@app.command(epilog=_epilog("internevo plan configs/7B_llama2.py --gpus 1024 --gpu h100 data.global_batch_size=1024"))
def plan(
    config: Annotated[
        Path | None, typer.Argument(parser=parse_input, metavar="CONFIG", help="Config file: .py, .yaml, .toml or .json.")
    ] = None,
    overrides: Overrides = None,
    gpus: Annotated[int | None, typer.Option(min=1, max=2**20, metavar="N", help="Number of GPUs.")] = None,
    gpu: Annotated[str | None, typer.Option(metavar="NAME|FILE.toml", help="Which GPU: its name (h100), or a file.")] = None,
    nodes: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Number of nodes (default: as many GPUs in a node as usual).")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(parser=parse_input, metavar="FILE.toml", help="What is reached of the GPU's peaks.")
    ] = None,
    memory: Annotated[
        int | None,
        typer.Option(parser=parse_size, metavar="SIZE", help="Memory that a rank may use (default: 90 % of the GPU's)."),
    ] = None,
    tokens: Annotated[
        float | None,
        typer.Option(parser=parse_tokens, metavar="N", help="Also print time, energy and price of N tokens, such as 2T."),
    ] = None,
    imbalance: Annotated[
        float, typer.Option(min=1, max=1e6, help="Rows of the rank whose experts get the most, divided by the mean.")
    ] = 1.0,
    out: Annotated[
        Path | None, typer.Option(parser=parse_path, metavar="FILE", help="Write the fastest layout as a config to this file.")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(parser=parse_path, metavar="FILE.svg", help="Draw memory against throughput.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure this machine, and write a file for --calibration (--out).")
    ] = False,
    nproc: Annotated[int | None, typer.Option(min=1, help="With --calibrate: number of local processes.")] = None,
) -> None:
    """Predict memory and time of a run on a cluster, and find the fastest layouts. No GPU is needed."""
    from .commands.plan import Question
    from .commands.plan import calibrate as measure
    from .commands.plan import plan as run

    if calibrate:
        others = {
            "CONFIG": config, "--gpus": gpus, "--nodes": nodes, "--calibration": calibration, "--memory": memory,
            "--tokens": tokens, "--imbalance": imbalance > 1, "--picture": picture, "--json": json,
        }  # fmt: skip
        if unused := [name for name, value in others.items() if value]:
            raise UsageError(f"--calibrate measures this machine: leave out {', '.join(unused)}")
        raise typer.Exit(measure(out or Path("calibration.toml"), gpu, nproc))
    if nproc is not None:
        raise UsageError("--nproc belongs to --calibrate")
    if config is None or gpus is None or gpu is None:
        raise UsageError("give CONFIG, --gpus N and --gpu NAME (h100, for example), or a file that describes the GPU")
    run(config, overrides or [], Question(gpus, gpu, nodes, calibration, memory, tokens, imbalance, out, picture, json))


app.command(epilog=_epilog("internevo tokenize corpus.jsonl --tokenizer llama/ --output data --valid-ratio 0.01"))(
    cli_data.tokenize
)
app.command(epilog=_epilog("internevo finetune HuggingFaceTB/SmolLM2-135M chats.jsonl --output runs/tuned --lora 16"))(
    cli_data.finetune
)


@app.command(
    epilog=_epilog("internevo convert runs/demo exported --to hf --dtype bfloat16")
    + " \n\n"
    + _epilog("internevo convert llama sparse --to hf --upcycle 8 --top-k 2")
)
def convert(
    source: Annotated[
        Path, typer.Argument(parser=parse_input, metavar="SOURCE", help="Hugging Face folder, checkpoint, or run folder.")
    ],
    target: Annotated[Path, typer.Argument(parser=parse_path, metavar="TARGET", help="Folder to write.")],
    to: Annotated[Literal["hf", "internevo", "peft", "gguf"], typer.Option(help="Format of the target (peft: adapters).")],
    family: Annotated[
        str | None, typer.Option(help="Family of a source that does not name it (LLAMA2, INTERNLM2, ...).")
    ] = None,
    write_as: Annotated[
        str | None,
        typer.Option("--as", help="Write as this family, for example InternLM2 as LLAMA2, which needs no extra code."),
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None, typer.Option(help="Dtype of the weights (default: as in the source).")
    ] = None,
    max_shard_size: Annotated[int, typer.Option(parser=parse_size, metavar="SIZE", help="Maximum size of a file.")] = "5GB",  # type: ignore[assignment]
    overwrite: Annotated[
        bool, typer.Option(help="Replace what this command wrote to the target before, and nothing else.")
    ] = False,
    upcycle: Annotated[
        int | None,
        typer.Option(min=2, metavar="EXPERTS", help="Give a dense model this many experts per layer: copies of its MLP."),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(min=1, metavar="K", help="With --upcycle: number of experts that each token chooses.")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(min=-(2**63), max=2**64 - 1, help="With --upcycle: seed of the routers' random weights (default: 0)."),
    ] = None,
) -> None:
    """Convert weights to or from Hugging Face's format, and to GGUF (llama.cpp) and peft."""
    from .commands.convert import convert_with_progress
    from .ops.precision import DTYPES

    convert_with_progress(
        source,
        target,
        to,
        family=family,
        write_as=write_as,
        dtype=DTYPES[dtype] if dtype else None,
        shard_bytes=max_shard_size,
        overwrite=overwrite,
        upcycle=upcycle,
        top_k=top_k,
        seed=seed,
    )


app.command(epilog=_epilog("internevo generate runs/demo --prompt 'def' --max-new-tokens 100 --seed 1"))(cli_models.generate)
app.command(epilog=_epilog("internevo chat exported --system 'Answer in one sentence.'"))(cli_models.chat)
app.command(epilog=_epilog("internevo evaluate runs/demo --data data/valid"))(cli_models.evaluate)


@app.command(epilog=_epilog("internevo inspect runs/demo"))
def inspect(
    path: Annotated[
        Path,
        typer.Argument(
            parser=parse_input, metavar="PATH", help="Checkpoint, run, model, adapters, tokenizer or data (also raw)."
        ),
    ],
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            parser=parse_input,
            metavar="PATH",
            help="Tokenizer of a dataset (default: the one in its folder or in a folder above).",
        ),
    ] = None,
    decode: Annotated[int, typer.Option(min=0, metavar="N", help="Also print N documents of a dataset as text.")] = 0,
) -> None:
    """Print what a folder contains, and check that it is intact."""
    from .commands.inspect import describe

    for line in describe(path, tokenizer, decode):
        print(line)


@app.command(epilog=_epilog("internevo report runs/a runs/b runs/c --output comparison.html"))
def report(
    runs: Annotated[list[Path], typer.Argument(parser=parse_input, metavar="RUN", help="Run folders.")],
    output: Annotated[
        Path | None,
        typer.Option(parser=parse_path, metavar="FILE", help="File for a comparison of runs (default: comparison.html)."),
    ] = None,
) -> None:
    """Write report.html in a run folder again; of several runs, a page that compares them."""
    from .commands.report import write

    print(write(runs, output))


@app.command(epilog=_epilog("internevo demo"))
def demo(
    config: Annotated[Path, typer.Option(parser=parse_input, metavar="CONFIG", help="Config file of the demo.")] = Path(
        "configs/demo.py"
    ),
    folder: Annotated[Path, typer.Option(parser=parse_path, metavar="FOLDER", help="Folder for data and results.")] = Path(
        "demo"
    ),
    steps: Annotated[int | None, typer.Option(min=1, help="Number of steps (default: as in the config).")] = None,
) -> None:
    """Train a small model, generate text, and export it.

    The data is the source code of Python's standard library.
    """
    from .commands.demo import run

    run(config, folder, steps)


@app.command(epilog=_epilog("internevo completion bash >> ~/.bashrc"))
def completion(
    shell: Annotated[Literal["bash", "zsh", "fish"], typer.Argument(metavar="SHELL", help="bash, zsh or fish.")],
) -> None:
    """Print the lines with which a shell completes commands, options and config keys."""
    print(completion_script(shell))


def main(arguments: list[str] | None = None) -> None:
    """Runs a command and exits: with 0 after success, 2 after wrong usage or a wrong config, 1 after a failure at run time."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments or DEBUG in os.environ
    arguments = [a for a in arguments if a != "--debug"]
    print_anything()
    _exit(_run(arguments, debug))


def _run(arguments: list[str], debug: bool) -> int:
    os.environ["PYTHONSAFEPATH"] = "1"  # processes that a command starts do not take modules from the current folder
    if debug:
        os.environ[DEBUG] = "1"
    try:
        return _call(arguments)
    except typer.TyperException as error:  # wrong usage: typer's message says what to do
        error.show()  # type: ignore[attr-defined]
        return 2
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)
        return 1
    except Exception as error:
        if debug:
            traceback.print_exc()
        elif isinstance(error, InternEvoError):
            print(f"error: {error}", file=sys.stderr)
        else:
            print(f"error: {describe_error(error)} (--debug prints the traceback)", file=sys.stderr)
        return error.exit_code if isinstance(error, InternEvoError) else 1


def _call(arguments: list[str]) -> int:
    prepare_completion()
    try:
        return int(app(arguments, standalone_mode=False) or 0)
    except typer.Abort as abort:
        if isinstance(abort.__cause__, EOFError):  # typer takes it for the end of standard input; it may be that of any file
            raise abort.__cause__ from None
        raise


def _exit(code: int) -> NoReturn:
    """Ends the process. If it was a rank of a run, Python is not shut down. After a failure, it would wait for the threads of
    the process groups (see ``world.join``), which may wait forever for other ranks. After success, such a thread that still
    needs Python would abort the process ("terminate called without an active exception")."""
    if f"{__package__}.parallel.world" in sys.modules:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):  # whoever reads the output may have ended
                stream.flush()
        os._exit(code)
    sys.exit(code)


def train_py() -> None:
    """InternEvo's own command line (``commands/original.py``)."""
    from .commands.original import parse

    a = parse()
    print_anything()
    overrides = [*a.overrides, *([f"seed={a.seed}"] if a.seed is not None else []), *(PROFILING if a.profiling else ())]

    @app.command("train.py", hidden=True)
    def start() -> None:
        from .commands.train import train as start_

        raise typer.Exit(start_(parse_input(a.config), overrides, None, port=a.port, launcher=a.launcher))

    _exit(_run(["train.py"], a.debug))
