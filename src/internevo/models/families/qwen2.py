"""Qwen2: Llama with biases on q, k and v, and optionally with sliding windows in the last layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ...config.model import Model
from ..config import DecoderConfig
from . import choices, llama

FAMILY = "QWEN2"
ARCHITECTURE = "Qwen2ForCausalLM"
HF_MODEL_TYPE = "qwen2"
HEAD = llama.HEAD
FIXED = {**llama.FIXED, **choices.HF_WINDOWS}
names = llama.names


def problems(model: Model) -> Iterator[str]:
    """Yields what does not fit this family in a config's ``model`` section."""
    yield from choices.problems(model, FAMILY, {**choices.MLP_BIAS, **choices.SLIDING_WINDOW})
    yield from no_bias(model, FAMILY)


def no_bias(model: Model, family: str) -> Iterator[str]:
    """Yields a message if ``no_bias`` is set, which these families do not use: q, k and v have biases and o has none."""
    if model.no_bias is not None:
        yield (
            f"model.no_bias = {model.no_bias} is not supported by model_type = {family!r}; set model.qkv_bias and model.o_bias"
        )


def from_section(model: Model) -> DecoderConfig:
    """Returns the decoder that a config's ``model`` section describes."""
    bias = True if model.qkv_bias is None else model.qkv_bias
    return replace(
        llama.from_section(model),
        family=FAMILY,
        qkv_bias=bias,
        o_bias=bool(model.o_bias),
        windows=section_windows(model),
    )


def from_hf(hf: dict[str, Any]) -> DecoderConfig:
    """Returns the decoder that a Hugging Face ``config.json`` describes. It has no key for the biases."""
    plain = llama.from_hf({"max_position_embeddings": 32768, **hf})
    return replace(plain, family=FAMILY, qkv_bias=True, o_bias=False, mlp_bias=False, windows=hf_windows(hf))


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Returns the Hugging Face ``config.json`` of a decoder."""
    values = {**llama.common_to_hf(config, ARCHITECTURE, HF_MODEL_TYPE), **windows_to_hf(config)}
    if config.head_dim * config.num_heads != config.hidden_size:
        values["head_dim"] = config.head_dim
    return values


def section_windows(model: Model) -> tuple[int, ...]:
    """Returns each layer's window for a config's ``model`` section: with ``use_sliding_window``, the layers from number
    ``max_window_layers`` on have the window ``sliding_window``."""
    if not model.use_sliding_window or not model.sliding_window:
        return ()
    return windows_from(model.num_layers, model.sliding_window, model.max_window_layers or 0)


def windows_from(layers: int, window: int, first: int) -> tuple[int, ...]:
    """Returns each layer's window: ``window`` from layer ``first`` on, and 0 (all tokens) before. Empty if no layer has one."""
    return tuple(window if layer >= first else 0 for layer in range(layers)) if first < layers else ()


def hf_windows(hf: dict[str, Any]) -> tuple[int, ...]:
    """Returns each layer's window for a ``config.json``, from ``layer_types`` (transformers 5) or from ``max_window_layers``.
    Without ``use_sliding_window`` no layer has one."""
    window = hf.get("sliding_window", 4096)
    if not hf.get("use_sliding_window", False) or not window:
        return ()
    kinds = hf.get("layer_types")
    if kinds:
        windows = tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
        return windows if any(windows) else ()
    return windows_from(hf["num_hidden_layers"], window, hf.get("max_window_layers", 28))


def windows_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Returns the keys of ``config.json`` for the windows: ``layer_types``, and those of older versions of transformers."""
    if not config.windows:
        return {"use_sliding_window": False, "sliding_window": None, "max_window_layers": config.num_layers}
    first = next(layer for layer, window in enumerate(config.windows) if window)
    return {
        "use_sliding_window": True,
        "sliding_window": max(config.windows),
        "max_window_layers": first,
        "layer_types": ["sliding_attention" if window else "full_attention" for window in config.windows],
    }
