"""Models in and out: ``load_model``, ``save_hf`` and conversion between checkpoints and Hugging Face folders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .checkpoint import Checkpoint, find_checkpoint
from .checkpoint.weights import write_checkpoint
from .errors import CheckpointError, UsageError
from .models import Decoder
from .models.folder import HfFolder, Module, Source, fill, write_hf
from .models.merge import merged

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def open_source(folder: Path, family: str | None = None) -> Source:
    """The model in ``folder``: a Hugging Face folder, a checkpoint, or a run folder's newest checkpoint; adapters merged.

    Raises:
        UsageError, CheckpointError: naming the folder or file, and the architecture where that is the reason.
    """
    if not folder.is_dir():
        raise UsageError(f"model folder {folder} does not exist")
    try:
        return merged(Checkpoint(find_checkpoint(folder)))
    except CheckpointError as error:
        ours = (folder / "checkpoints").is_dir() or (folder / "state.json").is_file()
        if ours:
            raise
        if not (folder / "config.json").is_file():
            raise UsageError(f"{error}; nor is it a Hugging Face folder (it has no config.json)") from None
    return HfFolder(folder, family)


def load_model(folder: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Decoder:
    """A model for inference, or for training by hand.

    Args:
        folder: a Hugging Face folder, a checkpoint, or a run folder (its newest checkpoint).

    Returns:
        ``model(tokens, positions=None, cu_seqlens=None) -> logits``, in evaluation mode.

    Raises:
        UsageError, CheckpointError: as ``open_source``.
    """
    source = open_source(Path(folder))
    with torch.device("meta"):
        model = Decoder(source.config)
    model.to(dtype).materialize(device)
    fill(model, source)
    return model.eval()


def save_hf(model: Decoder, folder: str | Path, dtype: torch.dtype | None = None, max_shard_size: int = 5 * 10**9) -> None:
    """Writes ``config.json`` and ``model*.safetensors`` (with an index when there are several) for transformers.

    Args:
        dtype: of the weights on disk; by default the model's.
        max_shard_size: bytes per file.
    """
    write_hf(Module(model.config, model), Path(folder), dtype=dtype, shard_bytes=max_shard_size)


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
        dtype: of the weights written; by default as in the source.
        progress: is told the bytes written, of how many.
    """
    if target.exists() and any(target.iterdir()):
        raise UsageError(f"target {target} is not empty; give another folder")
    if write_as and to != "hf":
        raise UsageError("--as is about Hugging Face folders: use it with --to hf")
    model = open_source(source, family)
    try:
        if to == "hf":
            write_hf(model, target, dtype=dtype, shard_bytes=shard_bytes, write_as=write_as, progress=progress)
        else:
            write_checkpoint(model, target, dtype=dtype, shard_bytes=shard_bytes, progress=progress)
    finally:
        shutil.rmtree(target.with_name(target.name + ".tmp"), ignore_errors=True)


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
