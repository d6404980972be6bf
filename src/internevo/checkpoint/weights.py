"""Writes a checkpoint with weights only, in one process and a few rows at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..models.decoder import parameter_shapes, stored_shapes
from ..models.source import ParameterSource, write_rows
from ..storage.folders import sync, target
from ..storage.header import Spec
from ..storage.tensors import ShardWriter
from .finish import Extras, add_files
from .folder import HF_CONFIG
from .manifest import NAME, Checksums, Chunk, FileEntry, Manifest, TensorEntry


def write_checkpoint(
    source: ParameterSource,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = 5 * 10**9,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Writes the weights of ``source`` as a checkpoint. It has a manifest only when it is complete.

    Args:
        folder: a new or empty folder.
        dtype: dtype of the weights on disk; None: that of each weight in the source. Balance biases are always in fp32.
        shard_bytes: maximum size of a file.
        progress: is called with the number of bytes written and the total.
    """
    with target(folder, NAME) as new:
        files, tensors = _write_weights(source, new, dtype, shard_bytes, progress)
        versions = {"internevo": __version__, "torch": torch.__version__}
        manifest = Manifest(
            step=0, layout={"world": 1}, versions=versions, files=files, tensors={f"model/{n}": t for n, t in tensors.items()}
        )
        values: dict[str, Any] = {"model.json": source.config.to_dict(), "state.json": {"step": 0}}
        if source.hf_config:
            values[HF_CONFIG] = source.hf_config
        add_files(new, manifest, Extras(values, source.tokenizer))
        manifest.write(new)


def _write_weights(
    source: ParameterSource, folder: Path, dtype: torch.dtype | None, shard_bytes: int, progress: Callable[[int, int], None]
) -> tuple[dict[str, FileEntry], dict[str, TensorEntry]]:
    """Writes the files. Returns the manifest's entries of the files and of the tensors."""
    specs, tensors = _chunks(source, dtype)
    sums: dict[str, Checksums] = defaultdict(Checksums)
    total, done = sum(spec.nbytes for spec in specs.values()), 0
    with ShardWriter(
        folder, specs, shard_bytes, lambda number, count: f"model-{number - 1:05d}.safetensors",
        on_bytes=lambda file, data: sums[file].update(data),
    ) as writer:  # fmt: skip
        for name, entry in tensors.items():
            rows_before = 0
            for chunk in entry.chunks:
                spec = specs[chunk.key]
                for row, count in spec.chunks(0, spec.rows):
                    done += write_rows(source, name, rows_before + row, count, spec.dtype, writer)
                    progress(done, total)
                rows_before += spec.rows
                chunk.file = writer.files[chunk.key]
    for file in sums:
        sync(folder / file)  # before there is a manifest
    return {file: s.entry() for file, s in sums.items()}, tensors


def _chunks(source: ParameterSource, dtype_on_disk: torch.dtype | None) -> tuple[dict[str, Spec], dict[str, TensorEntry]]:
    """Divides every weight into chunks: one, or one per expert, so that the experts of a layer can be in several files.

    Returns:
        Key of each chunk -> its spec; and name of each weight -> its entry in the manifest, without the names of the files.
    """
    specs: dict[str, Spec] = {}
    tensors, parameters = {}, parameter_shapes(source.config)
    for name, shape in stored_shapes(source.config).items():
        dtype = (dtype_on_disk if name in parameters else None) or source.dtype_of(name)
        entry = TensorEntry(str(dtype).removeprefix("torch."), list(shape), [])
        parts = shape[0] if len(shape) == 3 else 1
        sizes = [shape[0] // parts, *shape[1:]]
        for part in range(parts):
            key = f"{name}@{part}" if parts > 1 else name
            specs[key] = Spec(tuple(sizes), dtype)
            entry.chunks.append(Chunk("", key, [part * sizes[0], *[0] * (len(shape) - 1)], list(sizes)))
        tensors[name] = entry
    return specs, tensors
