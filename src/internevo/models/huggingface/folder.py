"""Reads and writes models in Hugging Face folders, a few rows at a time."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...errors import UsageError, expect
from ...storage.header import Spec
from ...storage.jsonfile import write_json
from ...storage.tensors import ByteRange, ShardWriter, joint_dtype
from ...text.tokenizer import Tokenizer, as_tokenizer
from ...wording import counted
from ..config import DecoderConfig
from ..decoder import Decoder, parameter_shapes, stored_shapes
from ..families.hf_values import read_config
from ..families.registry import decoder_from_hf, family
from ..source import ModelInMemory, ParameterSource, most_common_dtype, write_rows
from .naming import Naming, overlapping
from .owned import owned_target
from .tokenizer import SPECIAL_IDS, copy_tokenizer, has_tokenizer, special_ids
from .weights import Weights

log = logging.getLogger("internevo")
MODEL_FILES = r"config\.json|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
"""Regular expression of the names of the files that are always written."""
IGNORED = ("rotary_emb.inv_freq",)
"""Names of tensors in older files that are not needed; a name ends with one of these."""


class HfFolder:
    """A Hugging Face folder as a source of parameters.

    Raises:
        UsageError: if the folder cannot be read as a model. The message names the folder or file, and the architecture, field
            or tensor that does not fit.
    """

    def __init__(self, folder: Path, name: str | None = None) -> None:
        """
        Args:
            name: the family (``model_type`` of a config), if it is not to be taken from the folder's ``config.json``.
        """
        self.folder = folder
        self.hf_config = read_config(folder)
        self.config = decoder_from_hf(self.hf_config, str(folder), name)
        self.weights = Weights(folder)
        if self.config.tie_embeddings and self._has_own_head():
            log.warning(f"{folder}: config.json ties the head to the embedding, but they differ, so they are not tied")
            self.config = replace(self.config, tie_embeddings=False)
        self.naming = naming(self.config)
        self._check()

    def _has_own_head(self) -> bool:
        """Whether the head's weight is there and differs from the embedding. transformers does not tie them either then."""
        head = family(self.config.family).HEAD
        embedding = naming(self.config).by_parameter["embed.weight"][0].disk
        if head not in self.weights.files or embedding not in self.weights.files:
            return False
        ours, theirs = self.weights.spec(head), self.weights.spec(embedding)
        dtype = joint_dtype((ours.dtype, theirs.dtype))
        return ours.shape != theirs.shape or not all(
            torch.equal(self.weights.read(head, *rows).to(dtype), self.weights.read(embedding, *rows).to(dtype))
            for rows in ours.chunks(0, ours.rows)
        )

    def _check(self) -> None:
        for disk, shape in self.naming.shapes.items():
            if disk not in self.weights.files:
                raise UsageError(f"{self.folder} has no tensor {disk!r}, which {self.config.family} needs")
            found = self.weights.spec(disk)
            if found.shape != shape:
                raise UsageError(
                    f"{self.folder}: tensor {disk} has shape {list(found.shape)}, but by config.json it should have "
                    f"{list(shape)}"
                )
            if not found.dtype.is_floating_point:
                dtype = str(found.dtype).removeprefix("torch.")
                raise UsageError(f"{self.folder}: tensor {disk} has dtype {dtype}; weights must be floating-point numbers")
        tied = [family(self.config.family).HEAD] if self.config.tie_embeddings else []
        extra = self._left_out()
        if extra:
            log.warning(
                f"{self.folder}: left out {counted(len(extra), 'tensor')} of the layers for multi-token prediction "
                f"(num_nextn_predict_layers = {self.hf_config.get('num_nextn_predict_layers')}; first: {extra[0]})"
            )
        for disk in self.weights.files:
            if disk in extra:
                continue
            if disk not in self.naming.shapes and disk not in tied and not disk.endswith(IGNORED):
                raise UsageError(
                    f"{self.folder} has a tensor {disk!r}, which {self.config.family} with this config.json does not have"
                )

    def _left_out(self) -> list[str]:
        """Returns the names of tensors that the family knows and does not use."""
        ignored = getattr(family(self.config.family), "ignored", None)
        return [disk for disk in self.weights.files if ignored(self.hf_config, disk)] if ignored else []

    def dtype_of(self, name: str) -> torch.dtype:
        """Returns the dtype of a parameter, also if the tensors on disk that it consists of have different dtypes."""
        return joint_dtype(self.weights.spec(mapping.disk).dtype for mapping in self.naming.by_parameter[name])

    @property
    def tokenizer(self) -> Path | None:
        """The folder itself, if it contains a tokenizer."""
        return self.folder if has_tokenizer(self.folder) else None

    def read(self, name: str, start: int, count: int) -> Tensor:
        """Reads rows of a parameter from the tensors on disk that have them, and joins them."""
        parts = overlapping(self.naming.by_parameter[name], start, count)
        read = [self.weights.read(mapping.disk, mapping.disk_row + row, n) for mapping, row, n in parts]
        dtype = joint_dtype(rows.dtype for rows in read)
        return read[0] if len(read) == 1 else torch.cat([rows.to(dtype) for rows in read])

    def byte_range(self, name: str, start: int, count: int) -> ByteRange | None:
        """Returns where these rows are in a file, if one tensor on disk has all of them; otherwise None."""
        parts = list(overlapping(self.naming.by_parameter[name], start, count))
        (mapping, row, rows), whole = parts[0], len(parts) == 1
        return self.weights.byte_range(mapping.disk, mapping.disk_row + row, rows) if whole else None


def naming(config: DecoderConfig) -> Naming:
    """Returns where every parameter of a model is on disk, in its family's Hugging Face folders. The balance biases of its
    routers are there, too, if the family has them."""
    module = family(config.family)
    return Naming(module.names(config), stored_shapes(config) if _has_biases(module) else parameter_shapes(config))


def _has_biases(module: ModuleType) -> bool:
    """Whether the folders of a family have the balance biases of routers."""
    return getattr(module, "BALANCE_BIAS", False)


def save_hf(
    model: Decoder,
    folder: str | Path,
    dtype: torch.dtype | None = None,
    max_shard_size: int = 5 * 10**9,
    overwrite: bool = False,
    tokenizer: Tokenizer | str | Path | None = None,
) -> None:
    """Writes a model as a Hugging Face folder: ``config.json`` and ``model*.safetensors``, with an index if there are several.

    Args:
        model: a model of ``load_model``, or one that you have trained.
        folder: a new or empty folder.
        dtype: dtype of the weights on disk. None: each weight keeps its own.
        max_shard_size: maximum size of a file, in bytes.
        overwrite: the folder may have files. Those that this program has written are replaced, and all others stay as they
            are.
        tokenizer: the model's tokenizer, or its path, which is copied into the folder. None: the folder gets none.

    Raises:
        UsageError: if the folder is not empty and ``overwrite`` is False, or it cannot be written, or a file of another program
            is in the way, or the family's ``config.json`` cannot describe the model, or the tokenizer cannot be read or is
            larger than the model's vocabulary.
    """
    expect(model, Decoder, "save_hf takes what load_model returned")
    expect(dtype, (torch.dtype, type(None)), "dtype is one of PyTorch's, as torch.bfloat16")
    if max_shard_size < 1:
        raise UsageError(f"max_shard_size = {max_shard_size} must be at least 1 byte")
    tokenizer = None if tokenizer is None else as_tokenizer(tokenizer)
    if tokenizer is not None and not tokenizer.fits(model.config.vocab_size):
        raise UsageError(
            f"the tokenizer {tokenizer.path} has {tokenizer.vocab_size} entries, and the model's vocabulary only "
            f"{model.config.vocab_size}: it is not this model's"
        )
    source = ModelInMemory(model.config, model, None if tokenizer is None else tokenizer.path)
    write_hf(source, Path(folder), dtype=dtype, shard_bytes=max_shard_size, overwrite=overwrite)


def write_hf(
    source: ParameterSource,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = 5 * 10**9,
    write_as: str | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Writes a Hugging Face folder. It has a ``config.json`` only when it is complete.

    Args:
        dtype: dtype of the weights on disk. None: each weight keeps its own, so that nothing is rounded.
        shard_bytes: maximum size of a file, in bytes.
        write_as: the family whose names and ``config.json`` are written. None: the family of ``source``.
        overwrite: the folder may have files. Those that this program has written are replaced, and all others stay as they
            are.
        progress: called with (bytes written, bytes in all).

    Raises:
        UsageError: if the family's ``config.json`` cannot describe the model, or the folder is not empty or cannot be written.
    """
    name = write_as or source.config.family
    config = as_family(source.config if _has_biases(family(name)) else _without_zero_biases(source), name)
    with owned_target(folder, "config.json", _model_files(folder), overwrite) as new:
        _write_weights(source, naming(config), new, dtype, shard_bytes, progress)
        special: dict[str, Any] = {}
        if source.tokenizer:
            copy_tokenizer(source.tokenizer, new)
            special = special_ids(source.tokenizer)
        write_json(new / "config.json", _config_json(source, config, special, dtype or most_common_dtype(source)), indent=2)


def _without_zero_biases(source: ParameterSource) -> DecoderConfig:
    """Returns the shape of a model. If all balance biases of its routers are 0, which changes nothing, it has none."""
    config = source.config
    if config.experts is None or not config.experts.balance_bias:
        return config
    biases = stored_shapes(config).keys() - parameter_shapes(config).keys()
    if any(source.read(name, 0, config.experts.count).any() for name in biases):
        return config
    return replace(config, experts=config.experts.without_bias())


def _model_files(folder: Path) -> list[str]:
    """Returns the names of the files in ``folder`` that a model would replace."""
    return [path.name for path in folder.glob("*") if re.fullmatch(MODEL_FILES, path.name)]


def _write_weights(
    source: ParameterSource,
    names: Naming,
    folder: Path,
    dtype: torch.dtype | None,
    shard_bytes: int,
    progress: Callable[[int, int], None],
) -> None:
    specs, rounded = {}, parameter_shapes(source.config).keys()  # all but balance biases
    for disk, shape in names.shapes.items():
        parameters = {mapping.parameter for mapping in names.by_disk[disk]}
        given = dtype if parameters <= rounded else None
        specs[disk] = Spec(shape, given or joint_dtype(map(source.dtype_of, parameters)))
    total, done = sum(spec.nbytes for spec in specs.values()), 0
    with ShardWriter(folder, specs, shard_bytes, _shard_name) as writer:
        for disk, spec in specs.items():
            for mapping in names.by_disk[disk]:
                for row, count in spec.chunks(mapping.row, mapping.count):
                    done += write_rows(source, mapping.parameter, row, count, spec.dtype, writer)
                    progress(done, total)
    if len(writer.shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": writer.files}
        write_json(folder / "model.safetensors.index.json", index, indent=2)


def _shard_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def _config_json(source: ParameterSource, config: DecoderConfig, special: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Returns the values of ``config.json``. The model's own values override those of the folder that it was read from, and
    these override the tokenizer's. The dtype is in ``torch_dtype``, which every version of transformers reads.
    Special ids that are not known are null: for a missing key, transformers would take the one of the architecture's published
    model, which is another token, or outside of the vocabulary."""
    ours = family(config.family).to_hf(config)
    kept = source.hf_config if config.family == source.config.family else {}
    kept = {key: value for key, value in kept.items() if key not in ("dtype", "torch_dtype")}
    unknown = dict.fromkeys(("pad_token_id",) if kept else SPECIAL_IDS)
    return {**unknown, **special, **kept, **ours, "torch_dtype": str(dtype).removeprefix("torch.")}


def as_family(config: DecoderConfig, name: str) -> DecoderConfig:
    """Returns the same model as a model of family ``name``.

    Its experts have no capacity, because no ``config.json`` has a key for it.

    Raises:
        UsageError: if the family's ``config.json`` cannot describe the model; the message names the first field that differs.
    """
    module = family(name)
    if config.experts is not None and config.experts.balance_bias and not _has_biases(module):
        raise UsageError(
            f"a Hugging Face folder of {module.ARCHITECTURE} cannot describe this model: its routers have balance biases "
            "(model.moe_layer_kwargs.bias_update_speed), without which many tokens would go to other experts; only checkpoints "
            "have them (--to internevo)"
        )
    wanted = replace(config, family=name, experts=config.experts and config.experts.dropless())
    values = json.loads(json.dumps(module.to_hf(wanted)))
    try:
        difference = _difference(wanted, decoder_from_hf(values, "", name))
    except UsageError as error:
        difference = str(error).removeprefix("/config.json: ")
    if difference:
        raise UsageError(f"a Hugging Face folder of {module.ARCHITECTURE} cannot describe this model: {difference}")
    return wanted


def _difference(mine: Any, theirs: Any, prefix: str = "") -> str:
    """Says in which field two configs differ first; empty if they do not."""
    for field in fields(mine):
        values, name = (getattr(mine, field.name), getattr(theirs, field.name)), prefix + field.name
        if values[0] == values[1]:
            continue
        if all(map(is_dataclass, values)):
            return _difference(*values, f"{name}.")
        if any(map(is_dataclass, values)):
            return f"it has {name}, and the folder cannot" if values[1] is None else f"it has no {name}, and the folder would"
        return f"its {name} is {values[0]}, and in the folder it would be {values[1]}"
    return ""
