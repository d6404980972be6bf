"""Compares the model of a config with that of the weights that a run loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..config.run import MAY_DIFFER, LoadCkptInfo
from ..errors import ConfigError
from ..models.config import DecoderConfig
from ..models.decoder import parameter_shapes
from ..models.linear import ADAPTER_INFIX


def compare_models(mine: DecoderConfig, theirs: DecoderConfig, folder: Path, info: LoadCkptInfo) -> list[str]:
    """Compares the config's model with that of a folder, without adapters.

    Args:
        mine: the model of the config.
        theirs: the model of the checkpoint or Hugging Face folder ``folder``.
        info: says which differences are wanted (``may_differ``).

    Returns:
        Lines for the user about differences that are wanted, or that change nothing that the weights were trained for.

    Raises:
        ConfigError: if there are others. The message names every key that differs.
    """
    ours, others = mine.settings(), theirs.settings()
    lines, wrong = [], []
    for key in {**ours, **others}:
        a, b = ours.get(key), others.get(key)
        if a == b:
            continue
        line = f"{key} = {_text(a)} in the config, and {_text(b)} in {folder}"
        wanted = key.removeprefix("model.") in info.may_differ
        (lines if wanted or _is_free(key, mine, theirs) else wrong).append(line)
    if wrong:
        raise ConfigError(
            f"the config's model is not that of {folder}, whose weights are to be loaded:\n"
            + "".join(f"  {line}\n" for line in wrong)
            + "Correct these keys. If a difference is wanted, start in a new run folder (ckpt.save_ckpt_folder) and name it in "
            f"may_differ of ckpt.load_ckpt_info (possible: {', '.join(MAY_DIFFER)})"
        )
    return [f"note: {line}" for line in lines]


def _text(value: Any) -> str:
    return "not there" if value is None else repr(value)


def _is_free(key: str, mine: DecoderConfig, theirs: DecoderConfig) -> bool:
    """Whether a key says nothing about the weights: how many tokens are dropped in training, or a length that nothing uses."""
    if key == "model.max_position_embeddings":
        return not any(model.rope and model.rope.needs_length for model in (mine, theirs))
    return key.startswith("model.moe_layer_kwargs.")


def compare_names(config: DecoderConfig, stored: set[str], folder: Path) -> None:
    """Compares the names of a checkpoint's tensors with those of the config's model. The checkpoint may have no adapters.

    Args:
        stored: names of the tensors that are to be loaded (KIND/NAME).

    Raises:
        ConfigError: if the checkpoint lacks a weight, or has a tensor that the model does not have.
    """
    known = set(parameter_shapes(config))
    weights = {name.removeprefix("model/") for name in stored if name.startswith("model/")}
    states = {name: name.removeprefix("optimizer/").rpartition(".")[0] for name in stored if name.startswith("optimizer/")}
    unused = [f"model/{name}" for name in weights - known] + [name for name, weight in states.items() if weight not in known]
    missing = [f"model/{name}" for name in known - weights if ADAPTER_INFIX not in name] if weights else []
    for names, what in ((missing, "does not have"), (unused, "has, but the config's model does not use,")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise ConfigError(f"{folder} {what} the tensor {min(names)}{more}: it is a checkpoint of another model")
