"""Gemma 3, text only: Gemma with norms of queries and keys, norms after attention and MLP, and five layers with a sliding
window for each one without. Layers with a window have a rotary embedding of their own."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ...config.model import Model
from ...errors import UsageError
from ..config import DecoderConfig, Rope
from ..huggingface.naming import Names
from . import choices, gemma, llama
from . import rope as rope_hf

FAMILY = "GEMMA3"
ARCHITECTURE = "Gemma3ForCausalLM"
HF_MODEL_TYPE = "gemma3_text"
HEAD = llama.HEAD
PATTERN, WINDOW_BASE = 6, 10000.0
"""Every sixth layer has no window; the base of the rotary embedding of the others."""
FIXED: choices.Allowed = {
    **gemma.FIXED, **choices.HF_WINDOWS, "query_pre_attn_scalar": choices.ANY_VALUE, "attention_dropout": (0.0, None),
}  # fmt: skip
KINDS = ("full_attention", "sliding_attention")
"""The names of the two kinds of layers."""
NORMS = {
    "attn_norm": "input_layernorm", "attn_out_norm": "post_attention_layernorm", "mlp_norm": "pre_feedforward_layernorm",
    "mlp_out_norm": "post_feedforward_layernorm",
}  # fmt: skip
ALLOWED: choices.Allowed = {**choices.SLIDING_WINDOW, "add_unit_offset": (None, True), "use_swiglu": (None, False)}
DIFFERENCES: dict[str, Any] = {**gemma.DIFFERENCES, "family": FAMILY, "qk_norm": True, "out_norms": True}


def problems(model: Model) -> Iterator[str]:
    """Yields what does not fit this family in a config's ``model`` section."""
    yield from choices.problems(model, FAMILY, {**ALLOWED, "query_pre_attn_scalar": choices.ANY_VALUE})
    yield from max_window_layers(model, FAMILY, "every sixth layer")


def max_window_layers(model: Model, family: str, which: str) -> Iterator[str]:
    """Yields a message if ``max_window_layers`` is set, which these families do not use.

    Args:
        which: the layers that have no window.
    """
    if model.max_window_layers is not None:
        yield f"model.max_window_layers is not supported by model_type = {family!r}: {which} has no window"


def from_section(model: Model) -> DecoderConfig:
    """Returns the decoder that a config's ``model`` section describes. By default the head is tied to the embedding, and the
    window is 512 tokens, as in the models with 270 million and 1 billion parameters."""
    plain = llama.from_section(model)
    return replace(
        plain,
        tie_embeddings=model.tie_word_embeddings is not False,
        windows=windows(model.num_layers, section_window(model, 512), PATTERN),
        window_rope=Rope(WINDOW_BASE),
        query_scale=query_scale(plain.head_dim, model.query_pre_attn_scalar),
        **DIFFERENCES,
    )


def section_window(model: Model, default: int) -> int:
    """Returns the window of a config's ``model`` section; ``default`` if ``use_sliding_window`` is left out."""
    if "use_sliding_window" not in model.model_fields_set:
        return default
    return (model.sliding_window or 0) if model.use_sliding_window else 0


def query_scale(head_dim: int, scalar: int | None) -> float:
    """Returns ``DecoderConfig.query_scale``, with which scores are q k / sqrt(scalar)."""
    return 1.0 if scalar is None else math.sqrt(head_dim / scalar)


def windows(layers: int, window: int, pattern: int) -> tuple[int, ...]:
    """Returns each layer's window: each ``pattern``-th layer has none. Empty if no layer has one."""
    found = tuple(window if (layer + 1) % pattern else 0 for layer in range(layers))
    return found if any(found) else ()


def from_hf(hf: dict[str, Any]) -> DecoderConfig:
    """Returns the decoder that a Hugging Face ``config.json`` describes."""
    defaults = {
        "tie_word_embeddings": True, "head_dim": 256, "max_position_embeddings": 131072, "num_key_value_heads": 4,
        "sliding_window": 4096, "query_pre_attn_scalar": 256, "mlp_bias": False,
    }  # fmt: skip
    values = {**defaults, **hf}
    new = values.pop("rope_parameters", None) or {}
    if not isinstance(new, dict) or new.keys() - {*KINDS}:
        raise UsageError(f"rope_parameters = {new!r} must have the keys {' and '.join(KINDS)}")
    old = {"rope_theta": values.pop("rope_theta", None), "rope_scaling": values.pop("rope_scaling", None)}
    everywhere, windowed = KINDS
    rope = rope_hf.from_hf({**old, "rope_parameters": new.get(everywhere)}, default_base=1e6)
    own = rope_hf.from_hf({"rope_theta": hf.get("rope_local_base_freq"), "rope_parameters": new.get(windowed)}, WINDOW_BASE)
    plain = replace(llama.from_hf(values), **DIFFERENCES)
    of_layers = hf_windows(values, hf.get("sliding_window_pattern") or PATTERN)
    scale = query_scale(plain.head_dim, values["query_pre_attn_scalar"])
    return replace(plain, rope=rope, window_rope=own, windows=of_layers, query_scale=scale)


def hf_windows(values: dict[str, Any], pattern: int) -> tuple[int, ...]:
    """Returns each layer's window for a ``config.json``: from ``layer_types``, or else from the family's pattern."""
    window, kinds = values["sliding_window"] or 0, values.get("layer_types")
    if not kinds:
        return windows(values["num_hidden_layers"], window, pattern)
    found = tuple(window if kind == KINDS[1] else 0 for kind in kinds)
    return found if any(found) else ()


def windows_to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Returns the keys of ``config.json`` for the windows."""
    of_layers = config.windows or (0,) * config.num_layers
    return {
        "sliding_window": max(of_layers) or None,
        "layer_types": [KINDS[1] if window else KINDS[0] for window in of_layers],
    }


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Returns the Hugging Face ``config.json`` of a decoder, with the keys of transformers 4 and 5."""
    everywhere, windowed = KINDS
    own = config.window_rope or Rope(WINDOW_BASE)
    values = gemma.to_hf(config)
    if "rope_parameters" in values:
        parameters = {everywhere: values["rope_parameters"], windowed: rope_hf.to_hf(own)["rope_parameters"]}
        values |= {"rope_parameters": parameters, "rope_local_base_freq": own.base}
    return {
        **values,
        "architectures": [ARCHITECTURE],
        "model_type": HF_MODEL_TYPE,
        **windows_to_hf(config),
        "query_pre_attn_scalar": config.query_scalar,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
    }


def names(config: DecoderConfig) -> Names:
    """Returns where every parameter is on disk."""
    return llama.names(config, norms=NORMS)
