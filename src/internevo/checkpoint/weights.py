"""A checkpoint that holds weights only, written from one process."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from .. import __version__
from ..models import Decoder, DecoderConfig
from .manifest import Chunk, Manifest, TensorEntry
from .saver import Extras, complete


def write_checkpoint(
    config: DecoderConfig,
    parameter: Callable[[str], Tensor],
    folder: Path,
    *,
    dtype: torch.dtype,
    shard_bytes: int = 5 * 10**9,
    tokenizer: Path | None = None,
    progress: Callable[[str], None] = lambda name: None,
) -> None:
    """Writes every parameter, taken one at a time from ``parameter(name)``, into files of at most ``shard_bytes``."""
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    manifest = Manifest(step=0, layout={"world": 1}, versions={"internevo": __version__, "torch": torch.__version__})
    pending: dict[str, Tensor] = {}
    shards = 0

    def flush() -> None:
        nonlocal shards
        save_file(pending, temporary / _file(shards), metadata={"format": "pt"})
        pending.clear()
        shards += 1

    with torch.device("meta"):
        names = [name for name, _ in Decoder(config).named_parameters()]
    for name in names:
        tensor = parameter(name).detach().to("cpu", dtype, copy=True).contiguous()
        if pending and sum(t.nbytes for t in pending.values()) + tensor.nbytes > shard_bytes:
            flush()
        pending[name] = tensor
        chunk = Chunk(_file(shards), name, [0] * tensor.dim(), list(tensor.shape))
        manifest.tensors[f"model/{name}"] = TensorEntry(str(dtype).removeprefix("torch."), list(tensor.shape), [chunk])
        progress(name)
    flush()
    complete(temporary, folder, manifest, Extras({"model.json": config.to_dict(), "state.json": {"step": 0}}, tokenizer))


def _file(number: int) -> str:
    return f"model-{number:05d}.safetensors"
