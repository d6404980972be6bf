"""Models in and out: ``load_model``, ``save_hf`` and conversion between checkpoints and Hugging Face folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.open import open_source
from ..checkpoint.weights import write_checkpoint
from ..errors import UsageError
from ..models.huggingface.folder import write_hf


def convert(
    source: Path,
    target: Path,
    to: str,
    *,
    family: str | None = None,
    write_as: str | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = 5 * 10**9,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Converts a Hugging Face folder or a checkpoint to either; a few rows of one tensor are in memory at a time.

    Args:
        to: "hf" or "internevo" (a checkpoint that holds weights only).
        family: of a source that does not say it.
        write_as: the family under whose names a Hugging Face folder is written.
        dtype: of the weights written; by default each keeps the source's.
        progress: is told the bytes written, of how many.
    """
    if target.exists() and any(target.iterdir()):
        raise UsageError(f"target {target} is not empty; give another folder")
    if write_as and to != "hf":
        raise UsageError("--as is about Hugging Face folders: use it with --to hf")
    model = open_source(source, family)
    if to == "hf":
        write_hf(model, target, dtype=dtype, shard_bytes=shard_bytes, write_as=write_as, progress=progress)
    else:
        write_checkpoint(model, target, dtype=dtype, shard_bytes=shard_bytes, progress=progress)


def convert_with_progress(source: Path, target: Path, to: str, **options: Any) -> None:
    """``convert`` with the same options under a progress bar, and a closing line."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    with Progress("converting", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()) as bar:
        task = bar.add_task("converting", total=None)
        convert(source, target, to, progress=lambda done, total: bar.update(task, completed=done, total=total), **options)
    print(f"{source} -> {target}")
    config = target / "config.json"
    if to == "hf" and "auto_map" in (values := json.loads(config.read_text(encoding="utf-8"))):
        file = values["auto_map"]["AutoConfig"].split(".")[0] + ".py"
        if not (target / file).is_file():
            print(
                f"note: transformers loads {values['architectures'][0]} with the family's own code ({file} and others), which "
                "the source did not hold; put it into the folder, or see --as"
            )
