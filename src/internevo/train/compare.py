"""Compares the model of a config with that of the weights that a run loads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..config.run import MAY_DIFFER, LoadCkptInfo
from ..errors import ConfigError
from ..models.config import DecoderConfig
from ..models.settings import BALANCE_BIAS, settings

MAY_BE_WANTED = (
    "Correct these keys. If a difference is wanted, start in a new run folder (ckpt.save_ckpt_folder) and name it in "
    f"may_differ of ckpt.load_ckpt_info (possible: {', '.join(MAY_DIFFER)})"
)


def compare_models(
    mine: DecoderConfig, theirs: DecoderConfig, folder: Path, info: LoadCkptInfo, advice: str = MAY_BE_WANTED
) -> list[str]:
    """Compares the config's model with that of a folder, without adapters.

    Args:
        mine: the model of the config.
        theirs: the model of the checkpoint or Hugging Face folder ``folder``.
        info: says which differences are wanted (``may_differ``).
        advice: the end of the message about others.

    Returns:
        Lines for the user about differences that are wanted, or that change nothing that the weights were trained for.

    Raises:
        ConfigError: if there are others. The message names every key that differs.
    """
    lines: list[str] = []
    wrong: list[str] = []
    for key, line in differences(mine, theirs, str(folder)):
        wanted = key.removeprefix("model.") in info.may_differ
        (lines if wanted or _is_free(key, mine, theirs) else wrong).append(line)
    if wrong:
        raise ConfigError(
            f"the config's model is not that of {folder}, whose weights are to be loaded:\n"
            + "".join(f"  {line}\n" for line in wrong)
            + advice
        )
    return [f"note: {line}" for line in lines]


def differences(mine: DecoderConfig, theirs: DecoderConfig, place: str) -> Iterator[tuple[str, str]]:
    """Yields each key of a config in which two models differ, and a line that says how. ``place``: where ``theirs`` is."""
    ours, others = settings(mine), settings(theirs)
    for key in {**ours, **others}:
        a, b = ours.get(key), others.get(key)
        if a != b:
            yield key, f"{key} = {_text(a)} in the config, and {_text(b)} in {place}"


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
