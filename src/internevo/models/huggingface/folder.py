"""Models in and out of Hugging Face folders, a few rows at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import UsageError
from ...storage.tensors import Place, ShardWriter, Spec
from ...text.tokenizer import FILES, load_tokenizer
from ..config import DecoderConfig
from ..decoder import Decoder, parameter_shapes
from ..families.registry import decoder_from_hf, family
from ..source import Module, Source, pour
from .naming import Naming, overlap
from .weights import Weights, read_config

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "vocab.txt", "generation_config.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
CODE_FILES = ("configuration_*.py", "modeling_*.py", "tokenization_*.py")
"""A family's own code for transformers: carried along, never run."""
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
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

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights on disk."""
        return self.weights.spec(next(iter(self.naming.shapes))).dtype

    @property
    def tokenizer(self) -> Path | None:
        """The folder, if a tokenizer is in it."""
        names = (*FILES, "vocab.json", "vocab.txt")
        return self.folder if any((self.folder / n).is_file() for n in names) else None

    def read(self, name: str, start: int, count: int) -> Tensor:
        """Rows of a parameter, joined from the tensors on disk that hold them."""
        parts = overlap(self.naming.by_parameter[name], start, count)
        read = [self.weights.read(span.disk, span.disk_row + row, n) for span, row, n in parts]
        return read[0] if len(read) == 1 else torch.cat(read)

    def place(self, name: str, start: int, count: int) -> Place | None:
        """Where those rows lie, if it is one piece of one tensor on disk."""
        parts = list(overlap(self.naming.by_parameter[name], start, count))
        (span, row, rows), whole = parts[0], len(parts) == 1
        return self.weights.place(span.disk, span.disk_row + row, rows) if whole else None


def naming(config: DecoderConfig) -> Naming:
    """Where every parameter of a model is on disk."""
    return Naming(family(config.family).names(config), parameter_shapes(config))


def save_hf(model: Decoder, folder: str | Path, dtype: torch.dtype | None = None, max_shard_size: int = 5 * 10**9) -> None:
    """Writes ``config.json`` and ``model*.safetensors`` (with an index when there are several) for transformers.

    Args:
        dtype: of the weights on disk; by default the model's.
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
        dtype: of the weights on disk; by default the source's.
        write_as: the family under whose names they are written; by default the source's own.
        progress: is told the bytes written, of how many.
    """
    config = as_family(source.config, write_as or source.config.family)
    module, dtype = family(config.family), dtype or source.dtype
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    names = naming(config)
    specs = {disk: Spec(shape, dtype) for disk, shape in names.shapes.items()}
    writer = ShardWriter(temporary, specs, shard_bytes, _shard_name)
    total, done = sum(spec.nbytes for spec in specs.values()), 0
    for disk, spec in specs.items():
        for span in names.by_disk[disk]:
            for row, count in spec.chunks(span.row, span.count):
                done += pour(source, span.parameter, row, count, dtype, writer)
                progress(done, total)
    writer.close()
    if len(writer.shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": writer.files}
        (temporary / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    extra = copy_tokenizer(source.tokenizer, temporary) if source.tokenizer else {}
    values = _config_json(source, config, module.to_hf(config), extra, dtype)
    (temporary / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    temporary.replace(folder)


def _shard_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def _config_json(
    source: Source, config: DecoderConfig, ours: dict[str, Any], special: dict[str, Any], dtype: torch.dtype
) -> dict[str, Any]:
    """What the model came with, under what we know better. Every version of transformers reads ``torch_dtype``."""
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


def copy_tokenizer(source: Path, folder: Path) -> dict[str, Any]:
    """Copies a tokenizer file, or the tokenizer and code files of a folder. Returns the special ids of the folder's config."""
    folder.mkdir(parents=True, exist_ok=True)
    home = source if source.is_dir() else source.parent
    whole = source.is_dir() or source.name in TOKENIZER_FILES
    paths = [home / name for name in (TOKENIZER_FILES if whole else (source.name,))]
    if source.is_dir():
        paths += [path for pattern in CODE_FILES for path in home.glob(pattern)]
    for path in paths:
        if path.is_file():
            shutil.copyfile(path, folder / path.name)
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
