"""The model in a folder of any kind: a Hugging Face folder, a checkpoint, or a run folder."""

from __future__ import annotations

from pathlib import Path

import torch

from ..errors import CheckpointError, UsageError
from ..models.decoder import Decoder
from ..models.huggingface.folder import HfFolder
from ..models.huggingface.merge import merged
from ..models.source import ParameterSource, load_parameters
from .folder import Checkpoint, find_checkpoint


def open_source(folder: Path, family: str | None = None) -> ParameterSource:
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
    load_parameters(model, source)
    return model.eval()
