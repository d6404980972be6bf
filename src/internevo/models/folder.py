"""Models in and out of Hugging Face folders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config import DecoderConfig
from .decoder import Decoder
from .hf import FolderWriter, Weights, disk_tensors, read_config, read_tensors
from .registry import decoder_from_hf, family

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "vocab.txt", "generation_config.json", "chat_template.jinja",
)  # fmt: skip
EXTRA_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")


def load_hf(folder: Path, dtype: torch.dtype, device: str | torch.device, name: str | None = None) -> Decoder:
    """A model from a Hugging Face folder; ``name`` overrides its family."""
    config = decoder_from_hf(read_config(folder), str(folder), name)
    with torch.device("meta"):
        model = Decoder(config)
    model.to_empty(device=device).to(dtype)
    retie(model)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for key, tensor in read_tensors(Weights(folder), family(config.family).entries(config)):
            check_shape(folder, key, parameters[key].shape, tensor)
            parameters[key].copy_(tensor)
    return model


def retie(model: Decoder) -> None:
    """Ties the head again, which ``to_empty`` has made a weight of its own."""
    if model.config.tie_embeddings:
        model.head.weight = model.embed.weight


def check_shape(folder: Path, key: str, wanted: torch.Size, tensor: Tensor) -> None:
    """Refuses a tensor of another shape, by name."""
    from ..errors import UsageError

    if tensor.shape != wanted:
        raise UsageError(f"{folder}: {key} has shape {list(tensor.shape)}, and its config says {list(wanted)}")


def write_hf(
    config: DecoderConfig,
    parameter: Callable[[str], Tensor],
    folder: Path,
    *,
    dtype: torch.dtype,
    shard_bytes: int = 5 * 10**9,
    tokenizer: Path | None = None,
    write: bool = True,
    progress: Callable[[str], None] = lambda name: None,
) -> None:
    """Writes a Hugging Face folder, one tensor at a time.

    Args:
        parameter: gives a parameter by name, in full. Every rank must call it where that needs communication.
        write: whether this process writes (rank 0) or only takes part in ``parameter``.
        tokenizer: a folder or file whose tokenizer goes along.
    """
    module = family(config.family)
    writer = FolderWriter(folder, shard_bytes) if write else None
    for name, tensor in disk_tensors(module.entries(config), parameter):
        if writer is not None:
            # A copy of its own: safetensors refuses tensors that share memory with others.
            writer.add(name, tensor.detach().to("cpu", dtype, copy=True))
            progress(name)
    if writer is None:
        return
    extra = copy_tokenizer(tokenizer, folder) if tokenizer else {}
    writer.finish({**module.to_hf(config), **extra, "torch_dtype": str(dtype).removeprefix("torch.")})


def copy_tokenizer(source: Path, folder: Path) -> dict[str, Any]:
    """Copies tokenizer files beside the weights. Returns the special ids for config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [source] if source.is_file() else [source / name for name in TOKENIZER_FILES]
    for file in files:
        if file.is_file() and file.parent != folder:
            shutil.copyfile(file, folder / file.name)
    path = source / "config.json"
    known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if source.is_dir() and path.is_file() else {}
    return {key: known[key] for key in EXTRA_KEYS if known.get(key) is not None}
