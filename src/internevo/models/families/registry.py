"""The list of families. Finds a family by its name or from a Hugging Face config."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

from ...config.model import Model
from ...config.rope import SHARE
from ...errors import UsageError
from ..config import DecoderConfig, Lora
from . import (
    baichuan2,
    choices,
    deepseek2,
    deepseek3,
    gemma,
    gemma2,
    gemma3,
    glm,
    glm4,
    granite,
    hf_values,
    internlm,
    internlm2,
    internlm3,
    llama,
    mistral,
    mixtral,
    phi3,
    qwen2,
    qwen2moe,
    qwen3,
    qwen3moe,
    smollm3,
)

MODULES = (
    internlm,
    internlm2,
    internlm3,
    llama,
    qwen2,
    baichuan2,
    gemma,
    qwen2moe,
    mixtral,
    qwen3,
    qwen3moe,
    phi3,
    glm,
    glm4,
    gemma2,
    gemma3,
    deepseek2,
    deepseek3,
    mistral,
    smollm3,
    granite,
)
FAMILIES: dict[str, ModuleType] = {module.FAMILY: module for module in MODULES}


LATER = ("INTERNLM_MoE",)
"""Families of InternEvo that are not available yet."""


def problems(model_type: str, model: Model) -> Iterator[str]:
    """Yields what does not fit in a config's ``model_type`` and ``model`` section."""
    known = (*FAMILIES, *LATER)
    if model_type in FAMILIES:
        yield from FAMILIES[model_type].problems(model)
        share = (model.rope_scaling or {}).get(SHARE, 1)
        if share != 1 and not _rotates_partly(FAMILIES[model_type]):
            yield f"model.rope_scaling: {SHARE} = {share!r} is not supported by model_type = {model_type!r}: it must be 1"
    elif model_type not in known:
        near = difflib.get_close_matches(model_type.upper(), known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        yield f"model_type = {model_type!r} is unknown{hint} (known: {', '.join(known)})"


def _rotates_partly(module: ModuleType) -> bool:
    """Whether the family's models may rotate a part of each head only."""
    return getattr(module, "PARTIAL_ROTARY", False)


def family(name: str) -> ModuleType:
    """Returns the module of a family, by ``model_type`` of a config.

    Raises:
        UsageError: if there is no such family.
    """
    if name not in FAMILIES:
        raise UsageError(f"model family {name!r} is not available (available: {', '.join(FAMILIES)})")
    return FAMILIES[name]


def decoder_config(model_type: str, model: Model) -> DecoderConfig:
    """Returns the decoder that a config describes, with its adapters."""
    config: DecoderConfig = family(model_type).from_section(model)
    lora = model.lora
    if model.layer_windows is not None:
        config = replace(config, windows=model.layer_windows if any(model.layer_windows) else ())
    return replace(config, lora=None if lora is None else Lora(lora.rank, lora.alpha, lora.targets))


def family_of_hf(hf: dict[str, Any], folder: str) -> ModuleType:
    """Returns the module of the family of a Hugging Face config, by its ``model_type``, or otherwise by its architecture.

    Args:
        folder: the name of the folder in messages.

    Raises:
        UsageError: if no family fits.
    """
    architectures = hf.get("architectures") or []
    known = ", ".join(f"{name} ({m.ARCHITECTURE})" for name, m in FAMILIES.items())
    for module in FAMILIES.values():
        if hf.get("model_type") == module.HF_MODEL_TYPE:
            if architectures and not any(a.endswith("ForCausalLM") for a in architectures):
                raise UsageError(f"{folder}: architectures = {architectures} is not a language model (known: {known})")
            return module
    for module in FAMILIES.values():
        if "model_type" not in hf and module.ARCHITECTURE in architectures:
            return module
    field = "model_type" if "model_type" in hf else "architectures"
    what = " (a multimodal model; only language models can be read)" if _is_multimodal(hf) else ""
    given = f"{field} = {hf.get(field)!r}, architectures = {architectures}"
    raise UsageError(f"{folder}: no family fits {given}{what} (known: {known})")


def _is_multimodal(hf: dict[str, Any]) -> bool:
    """Whether a Hugging Face config is of a model that also reads or writes images or sounds."""
    return any(re.match("(vision|visual|audio|image|speech|img)_", key) or key == "visual" for key in hf)


def _check_fixed(hf: dict[str, Any], module: ModuleType, folder: str) -> None:
    """Checks that a family computes with all that a Hugging Face config says.

    Raises:
        UsageError: if a key has a value that the family does not know.
    """
    fixed: choices.Allowed = {**hf_values.FIXED, **module.FIXED}
    if hf.get("use_sliding_window") is False:  # then the window has no effect
        fixed = {**fixed, "sliding_window": choices.ANY_VALUE}
    for key, allowed in fixed.items():
        if allowed is not choices.ANY_VALUE and key in hf and hf[key] not in allowed:
            raise UsageError(
                f"{folder}/config.json: {key} = {hf[key]!r} does not fit {module.FAMILY}, "
                f"which needs {' or '.join(repr(v) for v in allowed)} (families: {', '.join(FAMILIES)})"
            )


def decoder_from_hf(hf: dict[str, Any], folder: str, name: str | None = None) -> DecoderConfig:
    """Returns the decoder that a Hugging Face config describes.

    Args:
        folder: the name of the folder in messages.
        name: the family, if it is not to be taken from the config.

    Raises:
        UsageError: if no family fits, or values are wrong. The message names the fields, and the families.
    """
    if wrong := list(hf_values.problems(hf)):
        raise UsageError(f"{folder}/config.json: " + "; ".join(wrong))
    module = family(name) if name else family_of_hf(hf, folder)
    _check_fixed(hf, module, folder)
    try:
        config: DecoderConfig = module.from_hf(hf)
    except KeyError as error:
        raise UsageError(f"{folder}/config.json has no {error.args[0]!r}, which {module.FAMILY} needs") from error
    except UsageError as error:
        raise UsageError(f"{folder}/config.json: {error}") from error
    if hf.get("model_type") in hf_values.ROTATE_NEIGHBOURS and not (config.rope and config.rope.interleaved):
        raise UsageError(
            f"{folder}/config.json: model_type = {hf['model_type']!r} does not fit {module.FAMILY}, which rotates other pairs"
        )
    if config.rope is not None and config.rope.share != 1 and not _rotates_partly(module):
        raise UsageError(
            f"{folder}/config.json: {SHARE} = {config.rope.share} is not supported for {module.FAMILY}: it must be 1"
        )
    return config
