"""Compares the model of a config with that of the weights that a run loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..config.run import MAY_DIFFER, LoadCkptInfo
from ..errors import ConfigError
from ..models.config import BALANCE_BIAS, DecoderConfig


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
    lines: list[str] = []
    wrong: list[str] = []
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
    """Whether a key says nothing about the weights: how many tokens are dropped in training, a length that nothing uses, or
    balance biases of the config's model that start at 0."""
    if key == "model.max_position_embeddings":
        return not any(model.rope and model.rope.needs_length for model in (mine, theirs))
    if key == BALANCE_BIAS:
        return theirs.experts is not None and not theirs.experts.balance_bias
    return key.startswith("model.moe_layer_kwargs.")
