"""Which families there are, and how one is found by name or from a Hugging Face config."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from ..config.model import Model
from ..errors import UsageError
from . import internlm2, llama
from .config import DecoderConfig

FAMILIES: dict[str, ModuleType] = {module.FAMILY: module for module in (internlm2, llama)}


def family(name: str) -> ModuleType:
    """The family's module, by InternEvo's ``model_type``."""
    if name not in FAMILIES:
        raise UsageError(f"model family {name!r} is not available (available: {', '.join(FAMILIES)})")
    return FAMILIES[name]


def decoder_config(model_type: str, model: Model) -> DecoderConfig:
    """The decoder that a config describes."""
    return family(model_type).from_section(model)


def family_of_hf(hf: dict[str, Any], folder: str) -> ModuleType:
    """The family of a Hugging Face config, by its architecture or model_type."""
    architectures = hf.get("architectures") or []
    for module in FAMILIES.values():
        if module.ARCHITECTURE in architectures:
            return module
    for module in FAMILIES.values():
        if hf.get("model_type") in module.HF_MODEL_TYPES and not architectures:
            return module
    known = ", ".join(m.ARCHITECTURE for m in FAMILIES.values())
    raise UsageError(
        f"{folder}: no family fits architectures = {architectures}, model_type = {hf.get('model_type')!r} (known: {known})"
    )


def decoder_from_hf(hf: dict[str, Any], folder: str, name: str | None = None) -> DecoderConfig:
    """The decoder of a Hugging Face config; ``name`` overrides the family that the folder claims."""
    module = family(name) if name else family_of_hf(hf, folder)
    try:
        return module.from_hf(hf)
    except KeyError as error:
        raise UsageError(f"{folder}/config.json has no {error.args[0]!r}, which {module.ARCHITECTURE} needs") from error
