"""Loads what a run starts from (``start``) into its parts."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import Checkpoint
from ..checkpoint.load import load_tensors
from ..checkpoint.storage import KINDS
from ..config.changes import changes
from ..config.run import LoadCkptInfo
from ..data.source import AT_THE_BEGINNING, Saved
from ..errors import CheckpointError, UsageError
from ..models.huggingface.folder import HfFolder
from ..models.huggingface.peft import PeftFolder
from ..models.linear import ADAPTER_INFIX
from ..models.source import ParameterSource
from ..parallel.shards import fill_local
from ..parallel.turns import Doing, in_turns
from ..storage.header import Spec
from ..storage.jsonfile import read_object
from ..wording import counted
from .optimizer import MOMENTUM
from .parts import Parts
from .start import check_source, find_start, has_new_adapters, has_new_biases, open_adapter


def restore(parts: Parts, run: Path, doing: Doing = nullcontext) -> list[str]:
    """Loads a checkpoint or weights into the parts of a run, if there is something to load. Every rank must call it.

    Args:
        run: the run folder.
        doing: a context that shows what is being done.

    Returns:
        Lines for the user about what was loaded.

    Raises:
        ConfigError: if what is loaded has another model than the config, or another format than the config says.
    """
    start = in_turns(parts.world, "finding what the run starts from", partial(find_start, parts.config.ckpt, run), doing)
    adapter = open_adapter(parts.decoder, start, parts.config.ckpt)
    if start is None:
        return []
    with doing(f"loading {start.source.folder}"):
        if isinstance(start.source, HfFolder):
            lines = load_hf(parts, start.source, start.wanted)
        else:
            lines = load_checkpoint(parts, start.source, start.wanted)
            if start.resumed:
                parts.state.run = start.source.manifest.run  # this is the same run
                lines += _changes(parts, start.source)
        return lines if adapter is None else [*lines, *load_adapter(parts, adapter)]


def _changes(parts: Parts, checkpoint: Checkpoint) -> list[str]:
    """Returns lines about the keys of the config that have changed since a checkpoint was saved."""
    try:
        recorded = read_object(checkpoint.folder / "config.json")
    except UsageError:
        return []  # a checkpoint that was converted has none, and nothing depends on it
    return [f"note: {line}" for line in changes(parts.recorded, recorded)]


def load_adapter(parts: Parts, adapter: PeftFolder) -> list[str]:
    """Loads the adapters of a run. Returns lines for the user about what was loaded."""
    for name, parameter in parts.optimizer.named.items():
        if ADAPTER_INFIX in name:
            fill_local(parameter, lambda start, stop, name=name: adapter.read(name, start, stop - start))  # type: ignore[misc]
    return [f"loaded adapters from {adapter.folder}"]


def load_checkpoint(parts: Parts, checkpoint: Checkpoint, wanted: LoadCkptInfo) -> list[str]:
    """Loads from a checkpoint what ``wanted`` names. Every rank must call it.

    Returns:
        Lines for the user about what was loaded.

    Raises:
        CheckpointError: if the checkpoint is damaged, has no such content or other adapters, or is not of the same data.
        ConfigError: if it is not of the config's model.
    """
    folder = checkpoint.folder
    lines = check_source(parts.decoder, checkpoint, wanted)
    kinds = tuple(f"{kind}/" for kind in KINDS if wanted.has(kind))
    tensors = {n: t for n, t in parts.tensors().items() if n.startswith(kinds)}
    if has_new_adapters(parts.decoder, checkpoint, wanted):
        tensors = {name: tensor for name, tensor in tensors.items() if ADAPTER_INFIX not in name}
    if has_new_biases(parts.decoder, checkpoint):
        tensors = {name: tensor for name, tensor in tensors.items() if name not in parts.biases()}
    _check_optimizer(tensors, checkpoint)
    load_tensors(checkpoint, tensors)
    state = checkpoint.json("state.json")
    if wanted.has("optimizer"):
        parts.optimizer.steps = state["updates"]
        parts.scaler.load(state["scaler"])
    parts.state.load(state, wanted)
    lines += [f"loaded {', '.join(wanted.content)} from {folder} (step {state['step']})"]
    if wanted.has("sampler"):
        lines += [
            *_compare_data(parts, state["data"], folder),
            *_compare_batches(parts, state["global_rows"], state.get("batches")),
        ]
    return lines


def _check_optimizer(tensors: Mapping[str, Tensor], checkpoint: Checkpoint) -> None:
    """Refuses the moments of another optimizer."""
    absent = [name for name in tensors if name.startswith("optimizer/") and name not in checkpoint.manifest.tensors]
    if absent:
        mine, theirs = ("Muon", "AdamW") if absent[0].endswith(MOMENTUM) else ("AdamW", "Muon")
        missing = list(dict.fromkeys(name.removeprefix("optimizer/").rpartition(".")[0] for name in absent))
        raise CheckpointError(
            f"{checkpoint.folder} has the moments of {theirs} for {missing[0]}"
            f"{f' and {len(missing) - 1} more' if len(missing) > 1 else ''}, and the config says {mine} (muon). Go on with "
            f"{theirs}; or start a run of its own (another ckpt.save_ckpt_folder) from its weights: "
            f'ckpt.load_ckpt_info=dict(path="{checkpoint.folder}", content=("model",))'
        )


def _compare_data(parts: Parts, data: str, folder: Path) -> list[str]:
    """Compares the data of a run with that of its checkpoint: a position in the data is valid only for the same data."""
    lines = []
    if data != parts.source.fingerprint():
        if parts.config.data.on_change == "stop":
            raise CheckpointError(
                f"the training data is not that of {folder} (other files, data.seed, lengths, seq_len or packing), so the "
                "position in the data that the checkpoint has is not valid. Use the old data; or set data.on_change=continue "
                "to go on in the new data (where it was in what is the same; else after the same number of rows, or at the "
                'next epoch of a stream); or load with content=("model", "optimizer", "scheduler") to start at the first row'
            )
        cursor = parts.state.cursor
        how = AT_THE_BEGINNING
        if cursor.position is not None:
            continued = parts.source.continue_from(Saved(cursor.position, data))
            cursor.position, how = continued.position, continued.how
        lines.append(f"the training data has changed since {folder} was saved; the run continues {how}")
    return lines


def _compare_batches(parts: Parts, old_rows: int, old: dict[str, Any] | None) -> list[str]:
    """Says in what the next batches differ from those that the run would have had before, and how to have the same again.

    Args:
        old_rows: the rows of the next global batch.
        old: ``BatchSizes.in_rows``. None: an older checkpoint does not have it.
    """
    rows, new = parts.sizes.rows(parts.state.cursor.batch), parts.sizes.in_rows()
    if rows == old_rows and (old is None or old["global_batch_size"] == new["global_batch_size"]):
        return []
    if old is None and new["rampup_batch_size"] is None:
        old = {"global_batch_size": old_rows, "rampup_batch_size": None}
    keys = "data.global_batch_size, and the rows of the ramp-up in data.rampup_batch_size,"
    if old is not None:
        keys = f"data.global_batch_size={old['global_batch_size']}"
        keys += f" data.rampup_batch_size={old['rampup_batch_size']!r}" if old["rampup_batch_size"] else ""
    return [
        f"the global batch has {counted(rows, 'row')} now{_after_ramp(new)}, and had {old_rows}{_after_ramp(old)} before: no "
        f"row is lost or repeated, but the batches differ; with {keys} they would be the same"
    ]


def _after_ramp(sizes: dict[str, Any] | None) -> str:
    return f" ({sizes['global_batch_size']} after the ramp-up)" if sizes and sizes["rampup_batch_size"] else ""


def load_hf(parts: Parts, source: HfFolder, wanted: LoadCkptInfo) -> list[str]:
    """Loads weights from a Hugging Face folder. Each rank reads only the rows of its shards.

    Returns:
        Lines for the user about what was loaded.

    Raises:
        ConfigError: if the folder's model is not that of the config.
    """
    lines = check_source(parts.decoder, source, wanted)
    read_shards(parts.optimizer.named, source)
    return [*lines, f"loaded weights from {source.folder}"]


def read_shards(parameters: Mapping[str, nn.Parameter], source: ParameterSource) -> None:
    """Reads this rank's shards of parameters. Adapters stay as they are."""
    for name, parameter in parameters.items():
        if ADAPTER_INFIX in name:
            continue
        shape = parameter.shape
        rows_per_slice = Spec(tuple(shape), torch.float32).rows // shape[0]  # 1, but for experts

        def values(start: int, stop: int, name: str = name, shape: torch.Size = shape, n: int = rows_per_slice) -> Tensor:
            return source.read(name, start * n, (stop - start) * n).view(stop - start, *shape[1:])

        fill_local(parameter, values)
