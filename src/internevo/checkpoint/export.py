"""Each checkpoint of a run in Hugging Face form as well (``ckpt.enable_internevo2hf_ckpt``)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from ..errors import ConfigError, InternEvoError, UsageError
from ..models.config import DecoderConfig
from ..models.huggingface.folder import as_family, write_hf
from ..models.huggingface.merge import merged
from ..models.huggingface.tokenizer import special_ids
from .folder import CHECKPOINTS, EXPORTS, Checkpoint


def check_export(decoder: DecoderConfig, tokenizer: str | None) -> None:
    """What would make every export of a run fail, known before its first step.

    Raises:
        ConfigError: when no Hugging Face folder can hold the model, or the tokenizer that goes with it cannot be opened.
    """
    try:
        as_family(replace(decoder, lora=None), decoder.family)
        if tokenizer and Path(tokenizer).exists():
            special_ids(Path(tokenizer))
    except UsageError as error:
        raise ConfigError(
            f"ckpt.enable_internevo2hf_ckpt: the checkpoints of this run cannot be exported: {error}; change that, or set "
            "ckpt.enable_internevo2hf_ckpt=False"
        ) from error


class Exporter:
    """Writes hf/step-N after checkpoint step-N of a run. The checkpoint is safe by then: an export that fails is a warning."""

    def __init__(self, run: Path, dtype: torch.dtype, warn: Callable[[str], None]) -> None:
        """
        Args:
            dtype: of the weights.
            warn: is told of an export that failed.
        """
        self.run, self.dtype, self.warn = run, dtype, warn

    def __call__(self, folder: Path) -> None:
        """Exports a complete checkpoint; snapshots are not exported."""
        if folder.parent != self.run / CHECKPOINTS:
            return
        target = self.run / EXPORTS / folder.name
        try:
            write_hf(merged(Checkpoint(folder)), target, dtype=self.dtype)
        except Exception as error:
            reason = str(error) if isinstance(error, InternEvoError | OSError) else f"{type(error).__name__}: {error}"
            self.warn(
                f"the export to {target} failed: {reason}. The checkpoint {folder} is complete, and training goes on; "
                f"`internevo convert {folder} {target} --to hf --dtype {str(self.dtype).removeprefix('torch.')}` exports it"
            )
