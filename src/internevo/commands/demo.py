"""``internevo demo``: runs the commands of a first training run one after the other, and prints each before it runs."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console

from ..errors import InternEvoError, UsageError
from ..observe.metrics import usable_rows

MARK = ".internevo-demo"
"""File in the folder of a demo."""
EXCLUDED = ("site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "__pycache__")


def run(config: Path, folder: Path, steps: int | None) -> None:
    """Prepares data, trains, generates text, exports the model and checks the export. All files are written to ``folder``.

    Args:
        config: the demo's config file.
        steps: number of steps to train; None: as in the config.

    Raises:
        InternEvoError: if one of the commands fails.
        UsageError: if the demo cannot run here, or ``folder`` has data, a run or an export that no demo has written.
    """
    _check(config, folder)
    say = Console(highlight=False, soft_wrap=True).print
    data, trained, exported = folder / "data", folder / "run", folder / "hf"
    library = sysconfig.get_paths()["stdlib"]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    overrides = [
        f"data.train_folder={data}/train", f"data.valid_folder={data}/valid", f"data.tokenizer_path={data}",
        f"ckpt.save_ckpt_folder={trained}", *([f"data.total_steps={steps}"] if steps else []),
        *_dtype(config),
    ]  # fmt: skip

    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).touch()
    say("[bold]1. Data: the source code of Python's standard library, and a tokenizer trained on it[/bold]")
    if not (data / "tokenizer.json").is_file() or not (data / "valid").is_dir():
        exclude = [word for name in EXCLUDED for word in ("--exclude", name)]
        _internevo(
            "tokenize", library, "--output", str(data), "--format", "text", "--pattern", "*.py", *exclude, "--type", "code",
            "--train-tokenizer", "bpe", "--vocab-size", "4096", "--valid-ratio", "0.02", "--overwrite",
        )  # fmt: skip
    _internevo("inspect", str(data / "train"))
    say("\n[bold]2. Training[/bold] (Ctrl-C saves and stops; the same command continues from there)")
    _internevo("train", str(config), *overrides, "--nproc", str(min(cores, 2)))
    say("\n[bold]3. Text that the model writes[/bold]")
    _internevo("generate", str(trained), "--prompt", "def", "--max-new-tokens", "80", "--temperature", "0.8", "--seed", "1")
    say("\n[bold]4. Export to Hugging Face, and a comparison of the logits[/bold]")
    _internevo("convert", str(trained), str(exported), "--to", "hf", "--overwrite")
    difference = compare_with_transformers(exported)
    say(f"transformers loads {exported}; largest difference of the logits: {difference:.1e}")
    if not difference < 1e-3:
        raise InternEvoError(f"transformers computes other logits with {exported}: they differ by up to {difference}")
    valid = usable_rows(trained / "metrics.jsonl", {"valid_loss": float})[0]
    if valid:
        say(f"\nvalidation perplexity after {valid[-1]['step']} steps: [bold]{valid[-1]['valid_ppl']:.2f}[/bold]")
    say(f"report: [bold]{(trained / 'report.html').resolve()}[/bold] (open it in a browser)")


def _check(config: Path, folder: Path) -> None:
    """Checks before anything is written that the demo can run, and that it replaces only what a demo has written."""
    if not config.is_file():
        what = "is not a file" if config.exists() else "does not exist: run this command in the repository"
        raise UsageError(f"{config} {what}, or use --config")
    if find_spec("transformers") is None:
        raise UsageError('the demo needs transformers: pip install "internevo[hf]"')
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is not a folder; give another one with --folder")
    others = [name for name in ("data", "run", "hf") if (folder / name).exists()]
    if others and not (folder / MARK).is_file():
        raise UsageError(f"{folder / others[0]} is not from a demo; give another folder with --folder")


def _dtype(config: Path) -> list[str]:
    """Returns an override to fp32 if the config's dtype is slow on this device."""
    from ..ops.precision import is_slow
    from ..parallel.world import first_device
    from ..train.config import load_config

    slow = is_slow(load_config(config).model.dtype, first_device())
    return ["model.dtype=torch.float32"] if slow else []


def _internevo(*arguments: str) -> None:
    """Prints a command and runs it."""
    print(f"\n$ internevo {shlex.join(arguments)}", flush=True)
    code = subprocess.run([sys.executable, "-m", "internevo", *arguments]).returncode
    if code:
        raise InternEvoError(f"internevo {arguments[0]} ended with exit code {code}")


def compare_with_transformers(folder: Path) -> float:
    """Returns the largest absolute difference between the logits of internevo and transformers for some random tokens."""
    import torch
    import transformers
    from transformers.utils import logging

    from .. import load_model

    ours = load_model(folder)
    logging.disable_progress_bar()
    loader: Any = transformers.AutoModelForCausalLM
    theirs, info = loader.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    problems = {kind: sorted(names) for kind, names in info.items() if names}
    if problems:
        raise InternEvoError(f"transformers cannot load all weights of {folder}: {json.dumps(problems, default=str)}")
    tokens = torch.randint(0, ours.config.vocab_size, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return float((ours(tokens) - theirs(tokens).logits).abs().max())
