"""SmolLM3: Llama with a tied head, whose every fourth layer has no rotary embedding. These layers may have a sliding window."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from ...config.model import Model
from ...errors import UsageError
from ...wording import counted
from ..config import DecoderConfig
from . import choices, gemma3, llama
from . import rope as rope_hf

FAMILY = "SMOLLM3"
ARCHITECTURE = "SmolLM3ForCausalLM"
HF_MODEL_TYPE = "smollm3"
HEAD = llama.HEAD
INTERVAL = 4
"""Every fourth layer has no rotary embedding, if a ``config.json`` does not say which."""
FIXED: choices.Allowed = {**llama.FIXED, **choices.HF_WINDOWS, **choices.NO_ROPE, "attention_dropout": (0.0, None)}
names = llama.names


def problems(model: Model) -> Iterator[str]:
    """Yields what does not fit this family in a config's ``model`` section."""
    yield from choices.problems(model, FAMILY, {**choices.MLP_BIAS, **choices.SLIDING_WINDOW, **choices.NO_ROPE})
    yield from gemma3.max_window_layers(model, FAMILY, "a layer with a rotary embedding")
    if model.use_sliding_window and all(_rotate(model)):
        yield (
            "model.use_sliding_window has no effect: layers without a rotary embedding get the window, and all have one; set "
            "model.no_rope_layer_interval, or model.layer_windows"
        )


def from_section(model: Model) -> DecoderConfig:
    """Returns the decoder that a config's ``model`` section describes. By default the head is tied to the embedding."""
    rotate = _rotate(model)
    plain = replace(llama.from_section(model), family=FAMILY, tie_embeddings=model.tie_word_embeddings is not False)
    window = model.sliding_window if model.use_sliding_window else None
    return _with_layers(plain, rotate, [not rotates for rotates in rotate], window)


def _rotate(model: Model) -> Sequence[int]:
    """Returns 1 for each layer with a rotary embedding, and 0 for each one without."""
    return model.no_rope_layers or _every(model.num_layers, model.no_rope_layer_interval)


def from_hf(hf: dict[str, Any]) -> DecoderConfig:
    """Returns the decoder that a Hugging Face ``config.json`` describes. ``no_rope_layers`` has 1 for layers that rotate.

    Raises:
        UsageError: if ``no_rope_layers`` does not have all layers, or keys contradict each other about the windows.
    """
    own, layers = choices.is_own(hf, HF_MODEL_TYPE), hf["num_hidden_layers"]
    defaults = {"tie_word_embeddings": True, "max_position_embeddings": 32768, "num_key_value_heads": 4}
    plain = llama.from_hf({**(defaults if own else {}), **hf})
    rope = rope_hf.from_hf(hf, default_base=2e6 if own else 10000.0)
    rotate, interval = hf.get("no_rope_layers"), hf.get("no_rope_layer_interval", INTERVAL if own else None)
    if rotate is None:
        rotate = _every(layers, interval)
    if len(rotate) < layers:
        raise UsageError(f"no_rope_layers has {counted(len(rotate), 'number')}, and num_hidden_layers = {layers}")
    plain, rotate = replace(plain, family=FAMILY, rope=rope), rotate[:layers]
    return _with_layers(plain, rotate, *_windows(hf, rotate))


def _windows(hf: dict[str, Any], rotate: Sequence[int]) -> tuple[list[bool], int | None]:
    """Returns for each layer whether it has a window, and the window."""
    kinds, window, used = hf.get("layer_types"), hf.get("sliding_window"), hf.get("use_sliding_window", False)
    windowed = [kind == "sliding_attention" for kind in kinds] if kinds else [not rotates for rotates in rotate]
    if not used and kinds and any(windowed):
        raise UsageError("layer_types has sliding_attention, and use_sliding_window is not true: which of them is meant?")
    if window and "use_sliding_window" not in hf and not choices.is_own(hf, HF_MODEL_TYPE):
        raise UsageError(f"sliding_window = {window} does not fit {FAMILY}, which needs use_sliding_window, too")
    return windowed, window if used else None


def _every(layers: int, interval: int | None) -> list[int]:
    """Returns 0 for every ``interval``-th layer, and 1 for the others."""
    return [int(not interval or (layer + 1) % interval != 0) for layer in range(layers)]


def _with_layers(plain: DecoderConfig, rotate: Sequence[int], windowed: Sequence[bool], window: int | None) -> DecoderConfig:
    """Returns a decoder with its layers without a rotary embedding, and with the windows of its layers."""
    without = tuple(layer for layer, rotates in enumerate(rotate) if not rotates)
    windows = tuple((window or 0) * one for one in windowed)
    return replace(plain, layers_without_rope=without, windows=windows if any(windows) else ())


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Returns the Hugging Face ``config.json`` of a decoder."""
    return {
        **llama.to_hf(config),
        **gemma3.windows_to_hf(config),
        "architectures": [ARCHITECTURE],
        "model_type": HF_MODEL_TYPE,
        "use_sliding_window": bool(config.windows),
        "no_rope_layers": [int(layer not in config.layers_without_rope) for layer in range(config.num_layers)],
    }
