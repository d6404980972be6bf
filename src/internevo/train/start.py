"""What a run starts from: its own newest checkpoint, what ``ckpt.load_ckpt_info`` names, or nothing; and whether it fits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from ..checkpoint import Checkpoint, complete_checkpoints, find_checkpoint
from ..checkpoint.folder import CHECKPOINTS
from ..checkpoint.manifest import NAME
from ..checkpoint.storage import KINDS
from ..config import Config
from ..config.run import Ckpt, LoadCkptInfo
from ..errors import CheckpointError, ConfigError, UsageError
from ..models.config import DecoderConfig
from ..models.families.registry import decoder_config
from ..models.huggingface.folder import HfFolder
from ..models.huggingface.peft import PeftFolder
from ..storage.hub import model_folder
from .compare import compare_models


class Start(NamedTuple):
    """What a run starts from."""

    source: Checkpoint | HfFolder
    wanted: LoadCkptInfo
    """What is loaded from it."""
    resumed: bool
    """Whether it is a checkpoint of this run."""


def find_start(ckpt: Ckpt, run: Path) -> Start | None:
    """Finds what a run starts from; None if it starts with initial weights.

    Args:
        run: the run folder.

    Raises:
        ConfigError: if what is to be loaded has another format than the config says.
    """
    if ckpt.auto_resume and ckpt.enable_save_ckpt and (found := complete_checkpoints(run)):
        return Start(Checkpoint(found[0]), LoadCkptInfo(path=str(found[0])), resumed=True)
    info = ckpt.load_ckpt_info
    if info is None or info.path is None:
        return None
    path = model_folder(info.path) if info.is_hf else Path(info.path)
    is_ours = (path / NAME).is_file() or (path / CHECKPOINTS).is_dir()
    if info.is_hf and is_ours:
        raise ConfigError(
            f"ckpt.load_ckpt_info: {path} is a checkpoint or run folder; leave out ckpt_type = {info.ckpt_type!r}"
        )
    if not info.is_hf and not is_ours and (path / "config.json").is_file():
        raise ConfigError(f'ckpt.load_ckpt_info: {path} is a Hugging Face folder; set ckpt_type="hf" and content=("model",)')
    return Start(HfFolder(path) if info.is_hf else Checkpoint(find_checkpoint(path)), info, resumed=False)


def check_start(config: Config) -> None:
    """Checks before any process is started that what a run starts from is of the config's model.

    Raises:
        ConfigError, CheckpointError: as ``find_start`` and ``check_source``.
    """
    start = find_start(config.ckpt, config.run_folder)
    decoder = decoder_config(config.model_type, config.model)
    if start is not None:
        check_source(decoder, start.source, start.wanted)
    open_adapter(decoder, start, config.ckpt)


def open_adapter(decoder: DecoderConfig, start: Start | None, ckpt: Ckpt) -> PeftFolder | None:
    """Opens the adapters that a run starts from; None if it resumes, or there are none.

    Raises:
        ConfigError: if they are not those of the config's model, or there is nothing that they adapt.
    """
    info = ckpt.load_ckpt_info
    if info is None or info.adapter is None or (start is not None and start.resumed):
        return None
    if start is None:
        raise ConfigError("ckpt.load_ckpt_info.adapter needs ckpt.load_ckpt_info.path, the weights that it adapts")
    if start.source.config.lora is not None:
        raise ConfigError("ckpt.load_ckpt_info.adapter: the checkpoint in path has adapters of its own; leave one of them out")
    try:
        return PeftFolder(Path(info.adapter), decoder)
    except UsageError as error:
        raise ConfigError(f"ckpt.load_ckpt_info.adapter: {error}") from error


def check_source(decoder: DecoderConfig, source: Checkpoint | HfFolder, wanted: LoadCkptInfo) -> list[str]:
    """Checks that what is to be loaded is of a model.

    Args:
        decoder: the model of the config.

    Returns:
        Lines for the user about differences that are wanted, or that change nothing that the weights were trained for.

    Raises:
        CheckpointError: if a checkpoint does not have what ``wanted`` names, or has other adapters.
        ConfigError: if the weights are not of the config's model.
    """
    lines = compare_models(decoder, source.config, source.folder, wanted)
    if not isinstance(source, Checkpoint):
        return lines
    if wanted.has("optimizer") and not any(name.startswith("optimizer/") for name in source.manifest.tensors):
        raise CheckpointError(f'{source.folder} has weights only; load it with content=("model",) (ckpt.load_ckpt_info)')
    mine, theirs = decoder.lora, source.config.lora
    if theirs != mine and not has_new_adapters(decoder, source, wanted):
        raise CheckpointError(
            f"{source.folder} has other adapters: model.lora is {theirs} in the checkpoint, and {mine} in the config. To "
            "continue without adapters, or with new ones, first merge those of the checkpoint (internevo convert CHECKPOINT "
            'TARGET --to internevo), and then load TARGET with content=("model",) (ckpt.load_ckpt_info)'
        )
    if decoder.experts is not None and has_new_biases(decoder, source):
        decoder = replace(decoder, experts=decoder.experts.without_bias())
    source.check_tensors(decoder, tuple(f"{kind}/" for kind in KINDS if wanted.has(kind)))
    return lines


def has_new_adapters(decoder: DecoderConfig, checkpoint: Checkpoint, wanted: LoadCkptInfo) -> bool:
    """Whether a model has adapters that keep their initial values, because the checkpoint has none."""
    return decoder.lora is not None and checkpoint.config.lora is None and not wanted.has("optimizer")


def has_new_biases(decoder: DecoderConfig, checkpoint: Checkpoint) -> bool:
    """Whether a model has experts whose balance biases start at 0, because the checkpoint has none."""
    return decoder.experts is not None and not (checkpoint.config.experts and checkpoint.config.experts.balance_bias)
