"""Qwen2-MoE: Qwen2's attention, many small experts, a shared expert with a sigmoid gate, and some layers without experts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ...config.model import Model
from ..config import DecoderConfig, Experts
from ..huggingface.naming import DiskRows, Names
from . import choices, experts, llama, qwen2

FAMILY = "QWEN2MOE"
ARCHITECTURE = "Qwen2MoeForCausalLM"
HF_MODEL_TYPE = "qwen2_moe"
HEAD = llama.HEAD
FIXED = {**llama.FIXED, **choices.HF_WINDOWS}
PARTS = {name: f"{name}_proj.weight" for name in ("gate", "up", "down")}


def problems(model: Model) -> Iterator[str]:
    """Yields what does not fit this family in a config's ``model`` section."""
    yield from experts.problems(model, FAMILY, shared=True)
    yield from qwen2.no_bias(model, FAMILY)


def from_section(model: Model) -> DecoderConfig:
    """Returns the decoder that a config's ``model`` section describes. The shared expert is as wide as ``num_shared_experts``
    experts."""
    size = model.moe_intermediate_size or model.mlp_width
    shared = model.shared_expert_intermediate_size or model.num_shared_experts * size
    return replace(qwen2.from_section(model), family=FAMILY, experts=experts.from_section(model, shared, normalize=False))


def from_hf(hf: dict[str, Any]) -> DecoderConfig:
    """Returns the decoder that a Hugging Face ``config.json`` describes."""
    moe = Experts(
        count=experts.count(hf),
        top_k=hf.get("num_experts_per_tok", 4),
        size=hf["moe_intermediate_size"],
        normalize=hf.get("norm_topk_prob", False),
        shared_size=hf["shared_expert_intermediate_size"],
        dense_layers=experts.hf_dense_layers(hf),
    )
    return replace(qwen2.from_hf(hf), family=FAMILY, qkv_bias=hf.get("qkv_bias", True), experts=moe, windows=_windows(hf))


def _windows(hf: dict[str, Any]) -> tuple[int, ...]:
    """Returns each layer's window. Without ``layer_types``, the even layers before ``max_window_layers`` have one, as in
    transformers 5."""
    if hf.get("layer_types") or not hf.get("use_sliding_window") or not hf.get("sliding_window"):
        return qwen2.hf_windows(hf)
    first = hf.get("max_window_layers", 28)
    windows = tuple(hf["sliding_window"] if n % 2 == 0 and n < first else 0 for n in range(hf["num_hidden_layers"]))
    return windows if any(windows) else ()


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Returns the Hugging Face ``config.json`` of a decoder."""
    moe = experts.require(config, ARCHITECTURE)
    return {
        **qwen2.to_hf(config),
        "architectures": [ARCHITECTURE],
        "model_type": HF_MODEL_TYPE,
        "qkv_bias": config.qkv_bias,
        "shared_expert_intermediate_size": moe.shared_size,
        **experts.to_hf(moe),
    }


def names(config: DecoderConfig) -> Names:
    """Returns where every parameter is on disk."""
    return llama.names(config, mlp=sparse_names)


def sparse_names(config: DecoderConfig, layer: int) -> Names:
    """Returns where a layer's experts, or its MLP, are on disk."""
    if config.experts is None or not config.is_sparse(layer):
        return llama.mlp_names(config, layer)
    disk = f"model.layers.{layer}.mlp"
    found = experts.names(config, layer, f"{disk}.gate.weight", f"{disk}.experts.{{}}", PARTS)
    if config.experts.shared_size:
        found |= llama.mlp_names(config, layer, "mlp.shared", "mlp.shared_expert")
        found[f"layers.{layer}.mlp.shared_gate.weight"] = [DiskRows(f"{disk}.shared_expert_gate.weight")]
    return found
