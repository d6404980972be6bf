"""Loads what a run starts from: its own newest checkpoint, what ``ckpt.load_ckpt_info`` names, or nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint import Checkpoint, complete_checkpoints, find_checkpoint
from ..checkpoint.folder import CHECKPOINTS, run_of
from ..checkpoint.load import load_tensors
from ..checkpoint.manifest import NAME
from ..checkpoint.storage import KINDS
from ..config.run import LoadCkptInfo
from ..errors import CheckpointError, ConfigError
from ..models.huggingface.folder import HfFolder
from ..models.linear import ADAPTER_INFIX
from ..parallel.shards import fill_local
from ..storage.header import Spec
from .compare import compare_models
from .parts import Parts


def restore(parts: Parts, run: Path) -> list[str]:
    """Loads a checkpoint or weights into the parts of a run, if there is something to load. Every rank must call it.

    Args:
        run: the run folder.

    Returns:
        Lines for the user about what was loaded.

    Raises:
        ConfigError: if what is loaded has another model than the config, or another format than the config says.
    """
    ckpt = parts.config.ckpt
    if ckpt.auto_resume and ckpt.enable_save_ckpt and (found := complete_checkpoints(run)):
        lines = load_checkpoint(parts, found[0], LoadCkptInfo(path=str(found[0])))
        parts.state.run = run_of(found[0])  # this is the same run
        return lines
    info = ckpt.load_ckpt_info
    if info is None or info.path is None:
        return []
    path, is_hf = Path(info.path), info.ckpt_type.startswith("hf")
    is_ours = (path / NAME).is_file() or (path / CHECKPOINTS).is_dir()
    if is_hf and is_ours:
        raise ConfigError(
            f"ckpt.load_ckpt_info: {path} is a checkpoint or run folder; leave out ckpt_type = {info.ckpt_type!r}"
        )
    if not is_hf and not is_ours and (path / "config.json").is_file():
        raise ConfigError(f'ckpt.load_ckpt_info: {path} is a Hugging Face folder; set ckpt_type="hf" and content=("model",)')
    return load_hf(parts, path, info) if is_hf else load_checkpoint(parts, find_checkpoint(path), info)


def load_checkpoint(parts: Parts, folder: Path, wanted: LoadCkptInfo) -> list[str]:
    """Loads from a checkpoint what ``wanted`` names. Every rank must call it.

    Returns:
        Lines for the user about what was loaded.

    Raises:
        CheckpointError: if the checkpoint is damaged, has no such content or other adapters, or is not of the same data.
        ConfigError: if it is not of the config's model.
    """
    checkpoint = Checkpoint(folder)
    lines = compare_models(parts.decoder, checkpoint.config, folder, wanted)
    kinds = tuple(f"{kind}/" for kind in KINDS if wanted.has(kind))
    if "optimizer/" in kinds and not any(n.startswith("optimizer/") for n in checkpoint.manifest.tensors):
        raise CheckpointError(f'{folder} has weights only; load it with content=("model",) (ckpt.load_ckpt_info)')
    tensors = {n: t for n, t in parts.tensors().items() if n.startswith(kinds)}
    mine, theirs = parts.decoder.lora, checkpoint.config.lora
    if mine and theirs is None and not wanted.has("optimizer"):
        # The checkpoint has no adapters, so the new ones keep their initial values.
        tensors = {name: tensor for name, tensor in tensors.items() if ADAPTER_INFIX not in name}
    elif theirs != mine:
        raise CheckpointError(
            f"{folder} has other adapters: model.lora is {theirs} in the checkpoint, and {mine} in the config. To continue "
            "without adapters, or with new ones, first merge those of the checkpoint (internevo convert CHECKPOINT TARGET --to "
            'internevo), and then load TARGET with content=("model",) (ckpt.load_ckpt_info)'
        )
    expected = parts.decoder
    if expected.experts is not None and not (checkpoint.config.experts and checkpoint.config.experts.balance_bias):
        # The routers of the checkpoint have no balance biases, so those of the run start at 0.
        expected = replace(expected, experts=expected.experts.without_bias())
        tensors = {name: tensor for name, tensor in tensors.items() if name not in parts.biases()}
    checkpoint.check_tensors(expected, kinds)
    load_tensors(checkpoint, tensors)
    state = checkpoint.json("state.json")
    if wanted.has("optimizer"):
        parts.optimizer.steps = state["updates"]
        parts.scaler.load(state["scaler"])
    parts.state.load(state, wanted)
    lines += [f"loaded {', '.join(wanted.content)} from {folder} (step {state['step']})"]
    if wanted.has("sampler"):
        lines += _compare_data(parts, state["data"], state["global_rows"], folder)
    return lines


def _compare_data(parts: Parts, data: str, global_rows: int, folder: Path) -> list[str]:
    """Compares the data of a run with that of its checkpoint: a position in the data is valid only for the same data."""
    lines = []
    if data != parts.source.fingerprint():
        if parts.config.data.on_change == "stop":
            raise CheckpointError(
                f"the training data is not that of {folder} (other files, data.seed, lengths, seq_len or packing), so the "
                "position in the data that the checkpoint has is not valid. Use the old data; or set data.on_change=continue "
                "to continue after the same number of rows; or load with "
                'content=("model", "optimizer", "scheduler") to start at the first row'
            )
        cursor = parts.state.cursor
        cursor.position = parts.source.position_after_change(cursor.position)
        lines.append(f"the training data has changed since {folder} was saved; the run continues after {cursor.rows} rows")
    rows = parts.sizes.rows(parts.state.cursor.batch)
    if rows != global_rows:
        lines.append(
            f"the global batch has {rows} rows now, and had {global_rows} before: no row is lost or repeated, but the batches "
            f"differ; with data.global_batch_size={global_rows} they would be the same"
        )
    return lines


def load_hf(parts: Parts, folder: Path, info: LoadCkptInfo) -> list[str]:
    """Loads weights from a Hugging Face folder. Each rank reads only the rows of its shards.

    Returns:
        Lines for the user about what was loaded.

    Raises:
        ConfigError: if the folder's model is not that of the config.
    """
    source = HfFolder(folder)
    lines = compare_models(parts.decoder, source.config, folder, info)
    for name, parameter in parts.optimizer.named.items():
        if ADAPTER_INFIX in name:
            continue
        shape = parameter.shape
        rows_per_slice = Spec(tuple(shape), torch.float32).rows // shape[0]  # 1, but for experts

        def values(start: int, stop: int, name: str = name, shape: torch.Size = shape, n: int = rows_per_slice) -> Tensor:
            return source.read(name, start * n, (stop - start) * n).view(stop - start, *shape[1:])

        fill_local(parameter, values)
    return [*lines, f"loaded weights from {folder}"]
