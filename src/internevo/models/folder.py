"""Models in and out of Hugging Face folders, one tensor at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from ..tokenizer import load_tokenizer
from .config import DecoderConfig
from .hf import Entry, FolderWriter, Weights, disk_tensors, read_config
from .registry import decoder_from_hf, family

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "vocab.txt", "generation_config.json", "chat_template.jinja",
)  # fmt: skip
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


class HfFolder:
    """A Hugging Face folder as a source of parameters.

    Raises:
        UsageError: naming the folder or file, and the architecture where no family fits.
    """

    def __init__(self, folder: Path, name: str | None = None) -> None:
        """``name`` overrides the family that the folder claims."""
        self.folder = folder
        self.config = decoder_from_hf(read_config(folder), str(folder), name)
        self.weights = Weights(folder)
        self._entries: dict[str, Entry] = {
            part: entry for entry in family(self.config.family).entries(self.config) for part in entry.parts
        }
        self._last: tuple[str, dict[str, Tensor]] = ("", {})

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights on disk."""
        return self.weights[next(iter(self._entries.values())).disk].dtype

    @property
    def tokenizer(self) -> Path | None:
        """The folder, if a tokenizer is in it."""
        names = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
        return self.folder if any((self.folder / n).is_file() for n in names) else None

    def parameter(self, name: str) -> Tensor:
        """A parameter by our name. Parameters that share one tensor on disk are read once when asked for in a row."""
        entry = self._entries[name]
        if self._last[0] != entry.disk:
            self._last = (entry.disk, dict(zip(entry.parts, entry.split(self.weights[entry.disk]), strict=True)))
        return self._last[1][name]


def fill(model: torch.nn.Module, parameter: Callable[[str], Tensor], source: Path) -> None:
    """Copies every parameter of a plain model from ``parameter(name)``; refuses another shape by name."""
    with torch.no_grad():
        for name, mine in model.named_parameters():
            tensor = parameter(name)
            if tensor.shape != mine.shape:
                raise UsageError(f"{source}: {name} has shape {list(tensor.shape)}, and its config says {list(mine.shape)}")
            mine.copy_(tensor)


def write_hf(
    config: DecoderConfig,
    parameter: Callable[[str], Tensor],
    folder: Path,
    *,
    dtype: torch.dtype,
    shard_bytes: int = 5 * 10**9,
    tokenizer: Path | None = None,
    progress: Callable[[str], None] = lambda name: None,
) -> None:
    """Writes a Hugging Face folder; it appears when it is whole.

    Args:
        parameter: gives a parameter in full, by our name.
        tokenizer: a folder or file whose tokenizer goes along.
    """
    module = family(config.family)
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    writer = FolderWriter(temporary, shard_bytes)
    for name, tensor in disk_tensors(module.entries(config), parameter):
        # A copy of its own: safetensors refuses tensors that share memory with others.
        writer.add(name, tensor.detach().to("cpu", dtype, copy=True))
        progress(name)
    extra = copy_tokenizer(tokenizer, temporary) if tokenizer else {}
    writer.finish({**module.to_hf(config), **extra, "torch_dtype": str(dtype).removeprefix("torch.")})
    shutil.rmtree(folder, ignore_errors=True)
    temporary.replace(folder)


def copy_tokenizer(source: Path, folder: Path) -> dict[str, Any]:
    """Copies a tokenizer file, or the tokenizer files of a folder. Returns the special ids of the folder's config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    home = source if source.is_dir() else source.parent
    names = TOKENIZER_FILES if source.is_dir() or source.name in TOKENIZER_FILES else (source.name,)
    for name in names:
        if (home / name).is_file():
            shutil.copyfile(home / name, folder / name)
    return _special_ids(home, source)


def _special_ids(home: Path, tokenizer: Path) -> dict[str, Any]:
    """Ids for config.json: as the folder's own config names them, else as its tokenizer does."""
    for name in ("config.json", "generation_config.json"):
        if (home / name).is_file():
            known = json.loads((home / name).read_text(encoding="utf-8"))
            ids = {key: known[key] for key in SPECIAL_IDS if known.get(key) is not None}
            if ids:
                return ids
    found = load_tokenizer(tokenizer)
    ids = {"bos_token_id": found.bos_id, "eos_token_id": found.eos_id}
    return {key: value for key, value in ids.items() if value is not None}
