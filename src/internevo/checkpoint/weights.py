"""A checkpoint that holds weights only, written from one process, a few rows at a time."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..models.decoder import parameter_shapes
from ..models.source import Source, pour
from ..storage.tensors import ShardWriter, Spec
from .finish import Extras, complete
from .folder import HF_CONFIG
from .manifest import Checksums, Chunk, Manifest, TensorEntry


def write_checkpoint(
    source: Source,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = 5 * 10**9,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Writes every parameter into files of about ``shard_bytes``; the folder appears when it is whole.

    Args:
        dtype: of the weights on disk; by default the source's.
        progress: is told the bytes written, of how many.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    dtype = dtype or source.dtype
    boxes, tensors = _boxes(parameter_shapes(source.config), dtype)
    sums: dict[str, Checksums] = defaultdict(Checksums)
    writer = ShardWriter(
        temporary, boxes, shard_bytes, lambda number, count: f"model-{number - 1:05d}.safetensors",
        seen=lambda file, data: sums[file].update(data),
    )  # fmt: skip
    total, done = sum(spec.nbytes for spec in boxes.values()), 0
    for name, entry in tensors.items():
        rows_before = 0
        for chunk in entry.chunks:
            spec = boxes[chunk.key]
            for row, count in spec.chunks(0, spec.rows):
                done += pour(source, name, rows_before + row, count, dtype, writer)
                progress(done, total)
            rows_before += spec.rows
            chunk.file = writer.files[chunk.key]
    writer.close()
    manifest = Manifest(
        step=0, layout={"world": 1}, versions={"internevo": __version__, "torch": torch.__version__},
        files={file: s.entry() for file, s in sums.items()}, tensors={f"model/{n}": t for n, t in tensors.items()},
    )  # fmt: skip
    values: dict[str, Any] = {"model.json": source.config.to_dict(), "state.json": {"step": 0}}
    if source.hf_config:
        values[HF_CONFIG] = source.hf_config
    complete(temporary, folder, manifest, Extras(values, source.tokenizer), durable=False)


def _boxes(shapes: dict[str, torch.Size], dtype: torch.dtype) -> tuple[dict[str, Spec], dict[str, TensorEntry]]:
    """What is stored under which key, and the boxes of every parameter: one, or one for each expert, so that files can be cut
    between experts."""
    boxes: dict[str, Spec] = {}
    tensors = {}
    for name, shape in shapes.items():
        entry = TensorEntry(str(dtype).removeprefix("torch."), list(shape), [])
        parts = shape[0] if len(shape) == 3 else 1
        sizes = [shape[0] // parts, *shape[1:]]
        for part in range(parts):
            key = f"{name}@{part}" if parts > 1 else name
            boxes[key] = Spec(tuple(sizes), dtype)
            entry.chunks.append(Chunk("", key, [part * sizes[0], *[0] * (len(shape) - 1)], list(sizes)))
        tensors[name] = entry
    return boxes, tensors
