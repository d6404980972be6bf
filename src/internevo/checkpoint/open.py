"""Opens the model in a folder of any kind: a Hugging Face folder, a checkpoint, or a run folder."""

from __future__ import annotations

from pathlib import Path

import torch

from ..errors import CheckpointError, UsageError, expect
from ..models.decoder import Decoder
from ..models.families.hf_values import what_else
from ..models.huggingface.folder import HfFolder
from ..models.huggingface.merge import merged
from ..models.source import ParameterSource, load_parameters
from ..storage.hub import model_folder
from .folder import CHECKPOINTS, Checkpoint, find_checkpoint
from .manifest import NAME


def open_source(folder: Path, family: str | None = None, merge: bool = True) -> ParameterSource:
    """Opens a model for reading its weights.

    Args:
        folder: a Hugging Face folder, a checkpoint, or a run folder, whose newest checkpoint is used; or the name of a model on
            the Hugging Face Hub (owner/name).
        family: the family of a Hugging Face folder that does not name it.
        merge: whether adapters are merged into the weights.

    Raises:
        UsageError, CheckpointError: if the folder cannot be used. The message names the folder or file, and the architecture if
            that is the reason.
    """
    folder = model_folder(folder)
    if not folder.is_dir():
        what = f"is a file{what_else(folder)}" if folder.exists() else "does not exist"
        raise UsageError(f"model folder {folder} {what}")
    try:
        checkpoint = Checkpoint(find_checkpoint(folder))
        checkpoint.check_tensors(checkpoint.config)
        return merged(checkpoint) if merge else checkpoint
    except CheckpointError as error:
        is_ours = any((folder / name).exists() for name in (CHECKPOINTS, "state.json", NAME))
        if is_ours:
            raise
        if not (folder / "config.json").is_file():
            what = f"it is not a Hugging Face folder either (it has no config.json){what_else(folder)}"
            raise UsageError(f"{error}; {what}") from None
    return HfFolder(folder, family)


def load_model(folder: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Decoder:
    """Loads a model, for inference or for your own training loop.

    Args:
        folder: as for ``open_source``.
        dtype: dtype of the weights.
        device: where the weights are.

    Returns:
        ``model(tokens, positions=None, cu_seqlens=None) -> logits``, in evaluation mode.

    Raises:
        UsageError, CheckpointError: if the folder or the device cannot be used. The message names the folder or file, and the
            architecture if that is the reason.
    """
    expect(folder, (str, Path), "load_model takes the path of a model")
    expect(dtype, torch.dtype, "dtype is one of PyTorch's, as torch.bfloat16")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # PyTorch without CUDA raises the latter
        raise UsageError(f"device = {str(device)!r} cannot be used: {str(error).splitlines()[0]}") from error
    source = open_source(Path(folder))
    with torch.device("meta"):
        model = Decoder(source.config)
    model.to(dtype).materialize(device)
    load_parameters(model, source)
    return model.eval()
