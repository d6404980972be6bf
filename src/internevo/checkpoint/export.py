"""Exports each checkpoint of a run to Hugging Face's format (``ckpt.enable_internevo2hf_ckpt``)."""

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
    """Checks before the first step that the checkpoints of a run can be exported.

    Args:
        decoder: the model.
        tokenizer: path of the tokenizer (``data.tokenizer_path``), if there is one.

    Raises:
        ConfigError: if Hugging Face's format cannot represent the model, or the tokenizer cannot be opened.
    """
    try:
        as_family(replace(decoder, lora=None), decoder.family)
        if tokenizer and Path(tokenizer).exists():
            special_ids(Path(tokenizer))
    except UsageError as error:
        raise ConfigError(
            f"ckpt.enable_internevo2hf_ckpt: the checkpoints of this run cannot be exported: {error}; correct this, or set "
            "ckpt.enable_internevo2hf_ckpt=False"
        ) from error


class Exporter:
    """Exports checkpoints/step-N of a run to hf/step-N. If that fails, it only warns, because the checkpoint is complete."""

    def __init__(self, run: Path, dtype: torch.dtype, warn: Callable[[str], None]) -> None:
        """
        Args:
            run: the run folder.
            dtype: dtype of the exported weights.
            warn: is called with a message if an export fails.
        """
        self.run, self.dtype, self.warn = run, dtype, warn

    def __call__(self, folder: Path) -> None:
        """Exports the complete checkpoint ``folder``. Snapshots are not exported."""
        if folder.parent != self.run / CHECKPOINTS:
            return
        target = self.run / EXPORTS / folder.name
        try:
            write_hf(merged(Checkpoint(folder)), target, dtype=self.dtype, overwrite=True)
        except Exception as error:
            reason = str(error) if isinstance(error, InternEvoError | OSError) else f"{type(error).__name__}: {error}"
            self.warn(
                f"the export to {target} failed: {reason}. The checkpoint {folder} is complete, and training continues. To "
                f"export it later: internevo convert {folder} {target} --to hf --dtype {str(self.dtype).removeprefix('torch.')}"
            )
