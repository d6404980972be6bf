"""Adapters in the form of the ``peft`` library: ``adapter_config.json`` and ``adapter_model.safetensors``.

For a linear M of transformers' model, the file has ``base_model.model.M.lora_A.weight`` [r, in] and ``lora_B.weight`` [out, r].
Where several of our linears are rows of one tensor on disk (q, k and v, say), their adapters are written as one: the rows of
the n matrices A one after the other, and in B a block of columns for each, so that its rank is n * r. Read back, such a
module may also have one A for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...config.hub import may_be_on_hub, split_revision
from ...errors import UsageError
from ...storage.header import Spec
from ...storage.jsonfile import read_object, write_json
from ...storage.tensors import ShardWriter, TensorFile
from ..config import DecoderConfig, Lora
from ..decoder import parameter_shapes
from ..linear import ADAPTER_INFIX
from ..source import ParameterSource
from .folder import naming
from .naming import Naming, RowMapping, row_count
from .owned import owned_target

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
FIXED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",), "bias": ("none", None), "use_dora": (False, None), "use_rslora": (False, None),
    "fan_in_fan_out": (False, None), "modules_to_save": (None, []), "lora_bias": (False, None), "layer_replication": (None,),
    "trainable_token_indices": (None,), "target_parameters": (None, []), "use_qalora": (False, None),
}  # fmt: skip
"""The values that keys of ``adapter_config.json`` may have: other kinds of adapters are refused."""


def write_peft(
    source: ParameterSource,
    folder: Path,
    *,
    base: str | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Writes the adapters of a model.

    Args:
        base: folder of the model that the adapters belong to, or its name on the hub (owner/name, or owner/name@revision),
            for ``adapter_config.json``.
        dtype: dtype on disk. None: each adapter keeps its own.
        overwrite: adapters that this program has written to ``folder`` before may be replaced.
        progress: called with (bytes written, bytes in all).

    Raises:
        UsageError: if the model has no adapters, or the folder cannot be written.
    """
    lora = source.config.lora
    if lora is None:
        raise UsageError("the source has no adapters (model.lora), which --to peft writes; use --to hf for the whole model")
    names = _naming(source.config)
    modules = _modules(source.config, names)
    with owned_target(folder, CONFIG, (CONFIG, WEIGHTS), overwrite) as new:
        tensors = {
            f"{PREFIX}{disk}.lora_{part}.weight": tensor
            for disk, mappings in modules.items()
            for part, tensor in zip("AB", _joined(source, mappings, lora, names.shapes[mappings[0].disk]), strict=True)
        }
        specs = {name: Spec(tuple(tensor.shape), dtype or tensor.dtype) for name, tensor in tensors.items()}
        total, done = sum(spec.nbytes for spec in specs.values()), 0
        with ShardWriter(new, specs, total + 1, lambda number, count: WEIGHTS) as writer:
            for name, tensor in tensors.items():
                writer.add(tensor.to(specs[name].dtype))
                done += specs[name].nbytes
                progress(done, total)
        write_json(new / CONFIG, _config(modules, lora, base), indent=2)


def _naming(config: DecoderConfig) -> Naming:
    """Returns where the weights without the adapters are on disk."""
    return naming(replace(config, lora=None))


def _modules(config: DecoderConfig, names: Naming) -> dict[str, list[RowMapping]]:
    """Returns the name of each of transformers' linears that has an adapter -> which rows of it are rows of our linears."""
    adapted = {name.partition(ADAPTER_INFIX)[0] + ".weight" for name in parameter_shapes(config) if ADAPTER_INFIX in name}
    disks = [disk for disk, mappings in names.by_disk.items() if any(mapping.parameter in adapted for mapping in mappings)]
    return {
        disk.removesuffix(".weight"): [mapping for mapping in names.by_disk[disk] if mapping.parameter in adapted]
        for disk in disks
    }


def _parts(mappings: list[RowMapping]) -> list[str]:
    """Returns our linears that have rows in a module, in order."""
    return list(dict.fromkeys(mapping.parameter for mapping in mappings))


def _joined(source: ParameterSource, mappings: list[RowMapping], lora: Lora, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Returns A and B of a module, whose weight has ``shape``."""
    names = _parts(mappings)
    paths = [name.removesuffix(".weight") + ADAPTER_INFIX for name in names]
    a = torch.cat([source.read(f"{path}a.weight", 0, lora.rank) for path in paths])
    b = torch.zeros(row_count(shape), len(names) * lora.rank, dtype=source.dtype_of(f"{paths[0]}b.weight"))
    for mapping in mappings:
        place = names.index(mapping.parameter)
        columns = slice(place * lora.rank, (place + 1) * lora.rank)
        values = source.read(f"{paths[place]}b.weight", mapping.row, mapping.count)
        b[mapping.disk_row : mapping.disk_row + mapping.count, columns] = values
    return a, b


def _config(modules: dict[str, list[RowMapping]], lora: Lora, base: str | None) -> dict[str, Any]:
    alpha = int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha
    joined = {disk.rpartition(".")[2]: len(_parts(mappings)) for disk, mappings in modules.items()}
    name, revision = split_revision(base) if base and may_be_on_hub(base) else (base, None)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": name,
        "revision": revision,
        "r": lora.rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(joined),
        "rank_pattern": {name: count * lora.rank for name, count in joined.items() if count > 1},
        "alpha_pattern": {name: count * alpha for name, count in joined.items() if count > 1},
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": None,
    }


class PeftFolder:
    """A folder of the ``peft`` library as a source of the adapters of a model.

    Raises:
        UsageError: if the folder cannot be read, or its adapters are not those of the model. The message says what differs.
    """

    def __init__(self, folder: Path, config: DecoderConfig) -> None:
        """
        Args:
            config: the model, with the adapters that are to be read.
        """
        self.folder = folder
        if config.lora is None:
            raise UsageError(f"{folder} has adapters, and the model has none; set model.lora")
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise UsageError(f"{folder} is not a folder of adapters of the peft library: it has no {name}")
        self.lora, self.values = config.lora, read_object(folder / CONFIG)
        for key, allowed in FIXED.items():
            if key in self.values and self.values[key] not in allowed:
                raise UsageError(f"{folder}/{CONFIG}: {key} = {self.values[key]!r} is not supported; only plain LoRA is")
        self.file, self.naming = TensorFile(folder / WEIGHTS), _naming(config)
        self.modules = _modules(config, self.naming)
        self._check()
        self._read = cache(self._pair)

    def _check(self) -> None:
        wanted = {f"{PREFIX}{disk}.lora_{part}.weight" for disk in self.modules for part in "AB"}
        found = self.file.specs.keys()
        if difference := sorted(wanted ^ found):
            where = "the model has no such adapter" if difference[0] in found else "the folder has no such tensor"
            raise UsageError(
                f"{self.folder}/{WEIGHTS} does not fit model.lora.targets = {self.lora.targets}: {difference[0]}: {where}"
            )
        for disk, mappings in self.modules.items():
            a, b = (self.file.specs[f"{PREFIX}{disk}.lora_{part}.weight"].shape for part in "AB")
            allowed = sorted({self.lora.rank, len(_parts(mappings)) * self.lora.rank})
            shape = self.naming.shapes[mappings[0].disk]
            if a[0] not in allowed or b != (row_count(shape), a[0]) or a[1:] != shape[-1:]:
                raise UsageError(
                    f"{self.folder}: {disk} has an adapter of shapes {list(a)} and {list(b)}, which does not fit the model "
                    f"with model.lora.rank = {self.lora.rank}"
                )
            scale = self._number(disk, "alpha_pattern", "lora_alpha") / self._number(disk, "rank_pattern", "r")
            if abs(scale - self.lora.alpha / self.lora.rank) > 1e-6 * scale:
                raise UsageError(
                    f"{self.folder}: the adapter of {disk} is multiplied by lora_alpha / r = {scale:g}, and with model.lora it "
                    f"would be {self.lora.alpha / self.lora.rank:g}; set model.lora.alpha = {scale * self.lora.rank:g}"
                )

    def _number(self, disk: str, pattern: str, key: str) -> float:
        """Returns the rank or alpha of a module."""
        patterns: Mapping[str, float] = self.values.get(pattern) or {}
        named = [value for name, value in patterns.items() if disk == name or disk.endswith(f".{name}")]
        value = named[0] if named else self.values.get(key, 8)
        if not isinstance(value, int | float) or value <= 0:
            raise UsageError(f"{self.folder}/{CONFIG}: {key} = {value!r} must be a number above 0")
        return float(value)

    def read(self, name: str, start: int, count: int) -> Tensor:
        """Reads rows of an adapter's weight, by its name in the decoder."""
        linear, _, part = name.partition(ADAPTER_INFIX)
        a, b = self._read(f"{linear}.weight")
        return (a if part == "a.weight" else b)[start : start + count]

    def _pair(self, name: str) -> tuple[Tensor, Tensor]:
        """Reads A and B of one of our linears."""
        mine = self.naming.by_parameter[name]
        module = mine[0].disk.removesuffix(".weight")
        a, b = (
            self.file.read(key, 0, self.file.specs[key].rows) for key in (f"{PREFIX}{module}.lora_{p}.weight" for p in "AB")
        )
        b = torch.cat([b[mapping.disk_row : mapping.disk_row + mapping.count] for mapping in mine])
        names, rank = _parts(self.modules[module]), self.lora.rank
        if a.shape[0] == rank:
            return a, b
        columns = slice(names.index(name) * rank, (names.index(name) + 1) * rank)
        rest = b.clone()
        rest[:, columns] = 0
        if rest.any():
            raise UsageError(
                f"{self.folder}: the adapter of {module} has rank {a.shape[0]} and is not made of {len(names)} of rank {rank}"
            )
        return a[columns], b[:, columns]
