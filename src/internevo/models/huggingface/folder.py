"""Models in and out of Hugging Face folders, a few rows at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import UsageError
from ...storage.folders import put_in_place, temporary
from ...storage.jsonfile import write_json
from ...storage.tensors import ByteRange, ShardWriter, Spec, joint_dtype
from ..config import DecoderConfig
from ..decoder import Decoder, parameter_shapes
from ..families.registry import decoder_from_hf, family
from ..source import Module, Source, pour, usual_dtype
from .naming import Naming, overlap
from .tokenizer import copy_tokenizer, has_tokenizer, special_ids
from .weights import Weights, read_config

IGNORED = ("rotary_emb.inv_freq",)
"""Ends of names of tensors that older files hold and nobody needs."""


class HfFolder:
    """A Hugging Face folder as a source.

    Raises:
        UsageError: naming the folder or file, and the architecture, field or tensor that does not fit.
    """

    def __init__(self, folder: Path, name: str | None = None) -> None:
        """``name`` overrides the family that the folder claims."""
        self.folder = folder
        self.hf_config = read_config(folder)
        self.config = decoder_from_hf(self.hf_config, str(folder), name)
        self.naming = naming(self.config)
        self.weights = Weights(folder)
        self._check()

    def _check(self) -> None:
        for disk, shape in self.naming.shapes.items():
            if disk not in self.weights.files:
                raise UsageError(f"{self.folder} has no tensor {disk!r}, which {self.config.family} needs")
            found = self.weights.spec(disk).shape
            if found != shape:
                raise UsageError(
                    f"{self.folder}: {disk} has shape {list(found)}, and by config.json it should have {list(shape)}"
                )
        tied = [family(self.config.family).HEAD] if self.config.tie_embeddings else []
        for disk in self.weights.files:
            if disk not in self.naming.shapes and disk not in tied and not disk.endswith(IGNORED):
                raise UsageError(f"{self.folder} holds a tensor {disk!r} that {self.config.family} of this config.json has not")

    def dtype_of(self, name: str) -> torch.dtype:
        """Of a parameter. The tensors on disk that it is joined from may differ."""
        return joint_dtype(self.weights.spec(span.disk).dtype for span in self.naming.by_parameter[name])

    @property
    def tokenizer(self) -> Path | None:
        """The folder, if a tokenizer is in it."""
        return self.folder if has_tokenizer(self.folder) else None

    def read(self, name: str, start: int, count: int) -> Tensor:
        """Rows of a parameter, joined from the tensors on disk that hold them."""
        parts = overlap(self.naming.by_parameter[name], start, count)
        read = [self.weights.read(span.disk, span.disk_row + row, n) for span, row, n in parts]
        dtype = joint_dtype(rows.dtype for rows in read)
        return read[0] if len(read) == 1 else torch.cat([rows.to(dtype) for rows in read])

    def byte_range(self, name: str, start: int, count: int) -> ByteRange | None:
        """Where those rows lie, if it is one piece of one tensor on disk."""
        parts = list(overlap(self.naming.by_parameter[name], start, count))
        (span, row, rows), whole = parts[0], len(parts) == 1
        return self.weights.byte_range(span.disk, span.disk_row + row, rows) if whole else None


def naming(config: DecoderConfig) -> Naming:
    """Where every parameter of a model is on disk."""
    return Naming(family(config.family).names(config), parameter_shapes(config))


def save_hf(model: Decoder, folder: str | Path, dtype: torch.dtype | None = None, max_shard_size: int = 5 * 10**9) -> None:
    """Writes ``config.json`` and ``model*.safetensors`` (with an index when there are several) for transformers.

    Args:
        dtype: of the weights on disk; by default each has the model's.
        max_shard_size: bytes per file.
    """
    write_hf(Module(model.config, model), Path(folder), dtype=dtype, shard_bytes=max_shard_size)


def write_hf(
    source: Source,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = 5 * 10**9,
    write_as: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Writes a Hugging Face folder; it appears when it is whole.

    Args:
        dtype: of the weights on disk; by default each keeps the source's, so that nothing is lost.
        write_as: the family under whose names they are written; by default the source's own.
        progress: is told the bytes written, of how many.
    """
    config = as_family(source.config, write_as or source.config.family)
    folder = folder.resolve()  # a link's target is written, on the disk that it is on
    with temporary(folder) as place:
        _write_weights(source, naming(config), place, dtype, shard_bytes, progress)
        special: dict[str, Any] = {}
        if source.tokenizer:
            copy_tokenizer(source.tokenizer, place)
            special = special_ids(source.tokenizer)
        write_json(place / "config.json", _config_json(source, config, special, dtype or usual_dtype(source)), indent=2)
        put_in_place(place, folder)


def _write_weights(
    source: Source,
    names: Naming,
    folder: Path,
    dtype: torch.dtype | None,
    shard_bytes: int,
    progress: Callable[[int, int], None],
) -> None:
    specs = {}
    for disk, shape in names.shapes.items():
        parameters = {span.parameter for span in names.by_disk[disk]}
        specs[disk] = Spec(shape, dtype or joint_dtype(map(source.dtype_of, parameters)))
    total, done = sum(spec.nbytes for spec in specs.values()), 0
    with ShardWriter(folder, specs, shard_bytes, _shard_name) as writer:
        for disk, spec in specs.items():
            for span in names.by_disk[disk]:
                for row, count in spec.chunks(span.row, span.count):
                    done += pour(source, span.parameter, row, count, spec.dtype, writer)
                    progress(done, total)
    if len(writer.shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": writer.files}
        write_json(folder / "model.safetensors.index.json", index, indent=2)


def _shard_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def _config_json(source: Source, config: DecoderConfig, special: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """What the model came with, under what we know better. Every version of transformers reads ``torch_dtype``."""
    ours = family(config.family).to_hf(config)
    kept = source.hf_config if config.family == source.config.family else {}
    kept = {key: value for key, value in kept.items() if key not in ("dtype", "torch_dtype")}
    return {**special, **kept, **ours, "torch_dtype": str(dtype).removeprefix("torch.")}


def as_family(config: DecoderConfig, name: str) -> DecoderConfig:
    """The same model as one of family ``name``, with experts that take all tokens, since no ``config.json`` says otherwise.

    Raises:
        UsageError: when that family's ``config.json`` cannot say what the model is; names the first field that does not fit.
    """
    module = family(name)
    wanted = replace(config, family=name, experts=config.experts and config.experts.dropless())
    read = module.from_hf(json.loads(json.dumps(module.to_hf(wanted))))
    for field in fields(DecoderConfig):
        mine, theirs = getattr(wanted, field.name), getattr(read, field.name)
        if mine != theirs:
            raise UsageError(
                f"a Hugging Face folder of {module.ARCHITECTURE} cannot hold this model: "
                f"its {field.name} is {mine}, and there it would be {theirs}"
            )
    return wanted
