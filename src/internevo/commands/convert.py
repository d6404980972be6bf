"""``internevo convert``: converts models between checkpoints and Hugging Face folders, and writes adapters for ``peft``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.folder import CHECKPOINTS, SNAPSHOTS, Checkpoint
from ..checkpoint.open import open_source
from ..checkpoint.weights import write_checkpoint
from ..config.option import MAX_EXPERTS
from ..errors import UsageError
from ..models.config import DecoderConfig
from ..models.huggingface.folder import write_hf
from ..models.huggingface.gguf import write_gguf
from ..models.huggingface.peft import write_peft
from ..models.huggingface.upcycle import upcycled
from ..models.source import ParameterSource
from ..storage.folders import check_target
from ..storage.jsonfile import read_object
from .progress import progress_bar


def convert(
    source: Path,
    target: Path,
    to: str,
    *,
    family: str | None = None,
    write_as: str | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = 5 * 10**9,
    overwrite: bool = False,
    upcycle: int | None = None,
    top_k: int | None = None,
    seed: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> DecoderConfig:
    """Converts a Hugging Face folder or a checkpoint to either of them. Only a few rows of one tensor are in memory at a time.

    Args:
        source: a Hugging Face folder, a checkpoint, or a run folder, whose newest checkpoint is used.
        target: a new or empty folder, outside of the source.
        to: "hf"; "internevo" for a checkpoint with weights only; "peft" for the adapters alone, in the form of that library; or
            "gguf" for a file that llama.cpp reads.
        family: the family of a source that does not name it.
        write_as: the family as which a Hugging Face folder is written; None: the model's own.
        dtype: dtype of the weights in the target; None: that of each weight in the source.
        shard_bytes: maximum size of a file.
        overwrite: not with "internevo": the target may have files. Those that this program has written are replaced, and all
            others stay as they are.
        upcycle: number of experts in each layer that a dense model gets (``models.huggingface.upcycle``).
        top_k: with ``upcycle``: number of experts that each token chooses.
        seed: with ``upcycle``: seed of the routers' weights; None: 0.
        progress: is called with the number of bytes written and the total.

    Returns:
        The shape of the model that was written.

    Raises:
        UsageError: if the target cannot be written or is not empty, or the options contradict each other.
    """
    _check_options(to, write_as, overwrite, upcycle, top_k, seed)
    check_target(target, overwrite, "give another folder" if to == "internevo" else "give another folder, or --overwrite")
    _check_outside(source, target)
    model: ParameterSource = open_source(source, family, merge=to != "peft")
    if upcycle is not None and top_k is not None:
        model = upcycled(model, upcycle, top_k, seed or 0)
    if to == "hf":
        write_hf(model, target, dtype=dtype, shard_bytes=shard_bytes, write_as=write_as, overwrite=overwrite, progress=progress)
    elif to == "gguf":
        write_gguf(model, target, dtype=dtype, overwrite=overwrite, progress=progress)
    elif to == "peft":
        write_peft(model, target, base=_base_of(model), dtype=dtype, overwrite=overwrite, progress=progress)
    else:
        write_checkpoint(model, target, dtype=dtype, shard_bytes=shard_bytes, progress=progress)
    return model.config


def _check_options(
    to: str, write_as: str | None, overwrite: bool, upcycle: int | None, top_k: int | None, seed: int | None
) -> None:
    """Raises a UsageError if the options of ``convert`` contradict each other."""
    if write_as and to != "hf":
        raise UsageError("--as is only for Hugging Face folders: use it with --to hf")
    if overwrite and to == "internevo":
        raise UsageError("--overwrite is not for checkpoints (--to internevo): give another folder")
    if upcycle is not None and to == "peft":
        raise UsageError("--upcycle makes a whole model: use it with --to hf or --to internevo")
    if upcycle is None and (top_k is not None or seed is not None):
        raise UsageError(f"{'--seed' if top_k is None else '--top-k'} is only for --upcycle")
    if upcycle is not None and upcycle > MAX_EXPERTS:
        raise UsageError(f"--upcycle {upcycle}: a layer can have at most {MAX_EXPERTS} experts")
    if upcycle is not None and (top_k is None or not 1 <= top_k <= upcycle):
        given = "" if top_k is None else f", not {top_k}"
        raise UsageError(f"--upcycle {upcycle} needs --top-k, the experts that each token chooses: 1 to {upcycle}{given}")


def _base_of(model: ParameterSource) -> str | None:
    """Returns the folder of the weights that the run of a checkpoint started from, if its run folder says so."""
    config = model.folder.parent.parent / "config.json" if isinstance(model, Checkpoint) else None
    if config is None or not config.is_file():
        return None
    info = (read_object(config).get("ckpt") or {}).get("load_ckpt_info") or {}
    return info.get("path")


def _check_outside(source: Path, target: Path) -> None:
    """Raises a UsageError if ``target`` is in the model's own folder, where it would be deleted together with it."""
    is_run = (source / CHECKPOINTS).is_dir()
    for folder in (source / CHECKPOINTS, source / SNAPSHOTS) if is_run else (source,):
        if folder.resolve() in (target.resolve(), *target.resolve().parents):
            raise UsageError(f"target {target} is inside {folder}; give a folder outside of it")


def convert_with_progress(source: Path, target: Path, to: str, **options: Any) -> None:
    """Calls ``convert`` with a progress bar, and prints a line at the end."""
    with progress_bar("converting") as (progress, _):
        written = convert(source, target, to, progress=progress, **options)
    print(f"{source} -> {target} ({written.summary()})")
    config = target / "config.json"
    if to == "hf" and "auto_map" in (values := json.loads(config.read_text(encoding="utf-8"))):
        file = values["auto_map"]["AutoConfig"].split(".")[0] + ".py"
        if not (target / file).is_file():
            print(
                f"note: transformers loads {values['architectures'][0]} with the family's own Python code ({file} and others), "
                "which is not in the source; copy it into the folder, or use --as"
            )
