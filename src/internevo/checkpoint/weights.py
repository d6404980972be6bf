"""A checkpoint that holds weights only, written from one process, a few rows at a time."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..models.decoder import parameter_shapes
from ..models.source import ParameterSource, write_rows
from ..storage.folders import temporary
from ..storage.tensors import ShardWriter, Spec
from .finish import Extras, complete
from .folder import HF_CONFIG
from .manifest import Checksums, Chunk, FileEntry, Manifest, TensorEntry


def write_checkpoint(
    source: ParameterSource,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = 5 * 10**9,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Writes every parameter into files of about ``shard_bytes``; the folder appears when it is whole.

    Args:
        dtype: of the weights on disk; by default each keeps the source's, so that nothing is lost.
        progress: is told the bytes written, of how many.
    """
    folder = folder.resolve()  # a link's target is written, on the disk that it is on
    with temporary(folder) as place:
        files, tensors = _write_weights(source, place, dtype, shard_bytes, progress)
        versions = {"internevo": __version__, "torch": torch.__version__}
        manifest = Manifest(
            step=0, layout={"world": 1}, versions=versions, files=files, tensors={f"model/{n}": t for n, t in tensors.items()}
        )
        values: dict[str, Any] = {"model.json": source.config.to_dict(), "state.json": {"step": 0}}
        if source.hf_config:
            values[HF_CONFIG] = source.hf_config
        complete(place, folder, manifest, Extras(values, source.tokenizer), durable=False)


def _write_weights(
    source: ParameterSource, folder: Path, dtype: torch.dtype | None, shard_bytes: int, progress: Callable[[int, int], None]
) -> tuple[dict[str, FileEntry], dict[str, TensorEntry]]:
    """What the manifest says of the files, and of the parameters in them."""
    boxes, tensors = _boxes(source, dtype)
    sums: dict[str, Checksums] = defaultdict(Checksums)
    total, done = sum(spec.nbytes for spec in boxes.values()), 0
    with ShardWriter(
        folder, boxes, shard_bytes, lambda number, count: f"model-{number - 1:05d}.safetensors",
        on_bytes=lambda file, data: sums[file].update(data),
    ) as writer:  # fmt: skip
        for name, entry in tensors.items():
            rows_before = 0
            for chunk in entry.chunks:
                spec = boxes[chunk.key]
                for row, count in spec.chunks(0, spec.rows):
                    done += write_rows(source, name, rows_before + row, count, spec.dtype, writer)
                    progress(done, total)
                rows_before += spec.rows
                chunk.file = writer.files[chunk.key]
    return {file: s.entry() for file, s in sums.items()}, tensors


def _boxes(source: ParameterSource, wanted: torch.dtype | None) -> tuple[dict[str, Spec], dict[str, TensorEntry]]:
    """What is stored under which key, and the boxes of every parameter: one, or one for each expert, so that files can be cut
    between experts."""
    boxes: dict[str, Spec] = {}
    tensors = {}
    for name, shape in parameter_shapes(source.config).items():
        dtype = wanted or source.dtype_of(name)
        entry = TensorEntry(str(dtype).removeprefix("torch."), list(shape), [])
        parts = shape[0] if len(shape) == 3 else 1
        sizes = [shape[0] // parts, *shape[1:]]
        for part in range(parts):
            key = f"{name}@{part}" if parts > 1 else name
            boxes[key] = Spec(tuple(sizes), dtype)
            entry.chunks.append(Chunk("", key, [part * sizes[0], *[0] * (len(shape) - 1)], list(sizes)))
        tensors[name] = entry
    return boxes, tensors
