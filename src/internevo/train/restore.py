"""What a run starts from: its own newest checkpoint, or what ``ckpt.load_ckpt_info`` names, or nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from ..checkpoint import Checkpoint, complete_checkpoints, find_checkpoint
from ..checkpoint.load import load_tensors
from ..checkpoint.storage import KINDS
from ..config.run import LoadCkptInfo
from ..errors import CheckpointError, UsageError
from ..models.folder import HfFolder

if TYPE_CHECKING:
    from .trainer import Trainer


def restore(trainer: Trainer) -> list[str]:
    """Loads into a freshly made trainer. Returns lines to tell the user."""
    ckpt = trainer.config.ckpt
    if ckpt.auto_resume and ckpt.enable_save_ckpt and (found := complete_checkpoints(trainer.run)):
        return load_checkpoint(trainer, found[0], LoadCkptInfo(path=str(found[0])))
    info = ckpt.load_ckpt_info
    if info is None or info.path is None:
        return []
    if info.ckpt_type.startswith("hf"):
        return load_hf(trainer, Path(info.path))
    return load_checkpoint(trainer, find_checkpoint(Path(info.path)), info)


def load_checkpoint(trainer: Trainer, folder: Path, wanted: LoadCkptInfo) -> list[str]:
    """Loads the parts that ``wanted`` names."""
    from .trainer import named_tensors

    checkpoint = Checkpoint(folder)
    kinds = tuple(f"{kind}/" for kind in KINDS if wanted.has(kind))
    if "optimizer/" in kinds and not any(n.startswith("optimizer/") for n in checkpoint.manifest.tensors):
        raise CheckpointError(f'{folder} holds weights only; load it with content=("model",) (ckpt.load_ckpt_info)')
    load_tensors(checkpoint, {n: t for n, t in named_tensors(trainer.optimizer).items() if n.startswith(kinds)})
    state = checkpoint.json("state.json")
    if wanted.has("optimizer"):
        trainer.optimizer.steps = state["updates"]
        trainer.scaler.load(state["scaler"])
    trainer.state.load(state, wanted)
    lines = [f"loaded {', '.join(wanted.content)} from {folder} (step {state['step']})"]
    if wanted.has("sampler"):
        lines += _compare_data(trainer, state["data"], state["global_rows"], folder)
    return lines


def _compare_data(trainer: Trainer, data: str, global_rows: int, folder: Path) -> list[str]:
    """The place in the data means what it meant only with the same data."""
    lines = []
    if data != trainer.rows.fingerprint():
        if trainer.config.data.on_change == "stop":
            raise CheckpointError(
                f"the training data is not that of {folder} (other files, lengths, seq_len or packing): the place in it "
                "means nothing. Give the old data; or set data.on_change=continue to go on at the same number of rows; or load "
                'with content=("model", "optimizer", "scheduler") to start the data anew'
            )
        lines.append(f"the training data has changed since {folder}; going on at row {trainer.state.cursor.rows}")
    rows = trainer.sizes.rows(trainer.state.cursor.batch)
    if rows != global_rows:
        lines.append(
            f"the global batch has now {rows} rows, and had {global_rows}: no row is lost or repeated, but the batches differ; "
            f"data.global_batch_size={global_rows} keeps them"
        )
    return lines


@torch.no_grad()
def load_hf(trainer: Trainer, folder: Path) -> list[str]:
    """Weights from a Hugging Face folder; each rank keeps its own part of each tensor."""
    source = HfFolder(folder)
    for name, parameter in trainer.optimizer.named.items():
        full = source.parameter(name)
        if full.shape != parameter.shape:
            raise UsageError(f"{folder}: {name} has shape {list(full.shape)}, and the config's model {list(parameter.shape)}")
        if isinstance(parameter, DTensor):
            part = distribute_tensor(full.float(), parameter.device_mesh, parameter.placements, src_data_rank=None)
            parameter.to_local().copy_(part.to_local())
        else:
            parameter.copy_(full)
    return [f"loaded weights from {folder}"]
