"""What a run that is resumed knows by itself: its newest checkpoint has the resolved config, and its folder the tokenizer.

So a run folder can be taken elsewhere, and the model that it was made from need not be there.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import Config
from ..errors import UsageError
from ..models.huggingface.tokenizer import copy_tokenizer, has_tokenizer
from ..storage.folders import clean_up, put_in_place, set_aside, temporary
from ..storage.jsonfile import read_object
from ..text.tokenizer import tokenizer_fingerprint

OF_MODEL = "config.json"
"""The file of a tokenizer's folder with what the model says about it."""
TOKENIZER = "tokenizer"
"""The folder of the tokenizer in a run folder, and in a checkpoint."""


@dataclass(frozen=True)
class Recorded:
    """The newest checkpoint of a run, of which only small files are read."""

    run: Path
    checkpoint: Path
    values: dict[str, Any]
    """Its resolved config."""

    @classmethod
    def find(cls, values: dict[str, Any]) -> Recorded | None:
        """Returns what the run with the values of a config goes on from; None if it is a new run, or it can't be read."""
        ckpt = values.get("ckpt") if isinstance(values.get("ckpt"), dict) else None
        name = (ckpt or {}).get("save_ckpt_folder") or f"runs/{values.get('JOB_NAME', Config.model_fields['JOB_NAME'].default)}"
        if not isinstance(name, str | os.PathLike) or any(
            (ckpt or {}).get(k) is False for k in ("auto_resume", "enable_save_ckpt")
        ):
            return None
        run = Path(name).expanduser()
        if not any(run.glob("*/*/manifest.json")):  # PyTorch takes seconds to import
            return None
        from ..checkpoint import complete_checkpoints

        for checkpoint in complete_checkpoints(run):
            try:
                return cls(run, checkpoint, read_object(checkpoint / "config.json"))
            except (OSError, UsageError):
                continue  # a checkpoint that was converted has none; a damaged one is named when it is loaded
        return None

    @classmethod
    def of(cls, config: Config) -> Recorded | None:
        """Returns what the run of a config goes on from, as ``find``. Then what a new run starts from is not read."""
        return cls.find({"ckpt": config.ckpt.model_dump(), "JOB_NAME": config.JOB_NAME})

    def tokenizer(self, path: str) -> Path | None:
        """Returns the tokenizer that the run has kept, if ``path`` is that of the run, and is not here or on the hub, where it
        may have changed."""
        if path != (self.values.get("data") or {}).get("tokenizer_path") or Path(path).exists():
            return None
        return next((copy for folder in (self.run, self.checkpoint) if has_tokenizer(copy := folder / TOKENIZER)), None)


def keep_tokenizer(run: Path, path: str | None) -> None:
    """Copies the tokenizer into the run folder. What is there and is another one gets another name."""
    kept = run / TOKENIZER
    clean_up(run, TOKENIZER)
    if path is None or not Path(path).exists() or Path(path).resolve() == kept.resolve():
        return
    with temporary(kept) as new:
        copy_tokenizer(Path(path), new)
        if kept.exists():
            if kept.is_dir() and tokenizer_fingerprint(kept) == tokenizer_fingerprint(new):
                if (new / OF_MODEL).is_file() and not (kept / OF_MODEL).exists():  # older versions did not copy it
                    (new / OF_MODEL).rename(kept / OF_MODEL)
                return
            set_aside(kept)
        put_in_place(new, kept)
