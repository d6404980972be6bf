"""Models in and out: ``load_model``, ``save_hf`` and conversion between checkpoints and Hugging Face folders."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from .checkpoint import Checkpoint, find_checkpoint
from .checkpoint.weights import write_checkpoint
from .errors import CheckpointError, UsageError
from .models import Decoder
from .models.folder import HfFolder, fill, write_hf

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def open_source(folder: Path, family: str | None = None) -> HfFolder | Checkpoint:
    """The model in ``folder``: a Hugging Face folder, a checkpoint, or a run folder's newest checkpoint.

    Raises:
        UsageError, CheckpointError: naming the folder or file, and the architecture where that is the reason.
    """
    if not folder.is_dir():
        raise UsageError(f"model folder {folder} does not exist")
    try:
        return Checkpoint(find_checkpoint(folder))
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
        ``model(tokens, positions=None, cu_seqlens=None) -> logits``.

    Raises:
        UsageError, CheckpointError: as ``open_source``.
    """
    source = open_source(Path(folder))
    with torch.device("meta"):
        model = Decoder(source.config)
    model.to(dtype).materialize(device)
    fill(model, source.parameter, Path(folder))
    return model


def save_hf(model: Decoder, folder: str | Path, dtype: torch.dtype | None = None, max_shard_size: int = 5 * 10**9) -> None:
    """Writes ``config.json`` and ``model*.safetensors`` (with an index when there are several) for transformers.

    Args:
        dtype: of the weights on disk; by default the model's.
        max_shard_size: bytes per file.
    """
    parameters = dict(model.named_parameters())
    dtype = dtype or next(model.parameters()).dtype
    write_hf(model.config, parameters.__getitem__, Path(folder), dtype=dtype, shard_bytes=max_shard_size)


def convert(
    source: Path,
    target: Path,
    to: str,
    *,
    family: str | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = 5 * 10**9,
    progress: Callable[[str], None] = lambda name: None,
) -> None:
    """Converts a Hugging Face folder or a checkpoint to either; one tensor is in memory at a time.

    Args:
        to: "hf" or "internevo" (a checkpoint that holds weights only).
        dtype: of the weights written; by default as in the source.
    """
    if target.exists() and any(target.iterdir()):
        raise UsageError(f"target {target} is not empty; give another folder")
    model = open_source(source, family)
    write = write_hf if to == "hf" else write_checkpoint
    try:
        write(
            model.config, model.parameter, target, dtype=dtype or model.dtype, shard_bytes=shard_bytes,
            tokenizer=model.tokenizer, progress=progress,
        )  # fmt: skip
    finally:
        shutil.rmtree(target.with_name(target.name + ".tmp"), ignore_errors=True)


def convert_with_progress(
    source: Path, target: Path, to: str, *, family: str | None, dtype: torch.dtype | None, shard_bytes: int
) -> None:
    """``convert`` under a progress bar, and a closing line."""
    from rich.progress import Progress

    with Progress() as bar:
        task = bar.add_task("converting", total=None)
        convert(
            source, target, to, family=family, dtype=dtype, shard_bytes=shard_bytes,
            progress=lambda name: bar.update(task, advance=1, description=name),
        )  # fmt: skip
        bar.update(task, description="converting", total=1, completed=1)
    print(f"{source} -> {target}")
