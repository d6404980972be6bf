"""InternLM2 and 2.5: Llama's mathematics; on disk, q, k and v are one weight, grouped by key/value head."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..config.model import Model
from . import llama
from .config import DecoderConfig
from .hf import Entry

FAMILY = "INTERNLM2"
ARCHITECTURE = "InternLM2ForCausalLM"
HF_MODEL_TYPES = ("internlm2",)


def from_section(model: Model) -> DecoderConfig:
    """The decoder that a config's ``model`` section describes."""
    return replace(llama.from_section(model), family=FAMILY)


def from_hf(hf: dict[str, Any]) -> DecoderConfig:
    """The decoder that a Hugging Face ``config.json`` describes. ``bias`` (default true) is on wqkv and wo."""
    bias = hf.get("bias", True)
    return replace(llama.from_hf(hf), family=FAMILY, qkv_bias=bias, o_bias=bias, mlp_bias=False)


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The Hugging Face ``config.json``; the folder's own code reads the keys of before transformers 5."""
    values = {
        "architectures": [ARCHITECTURE],
        "model_type": "internlm2",
        "auto_map": {
            "AutoConfig": "configuration_internlm2.InternLM2Config",
            "AutoModel": "modeling_internlm2.InternLM2ForCausalLM",
            "AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM",
        },
        "hidden_act": "silu",
        "bias": config.qkv_bias,
        **llama.common_to_hf(config),
    }
    del values["rope_parameters"]
    return values


def split_wqkv(tensor: Tensor, groups: int, per_group: int, head_dim: int) -> list[Tensor]:
    """wqkv rows are (K groups, H/K queries + key + value, head size); returns q, k, v."""
    view = tensor.view(groups, per_group + 2, head_dim, *tensor.shape[1:])
    return [part.reshape(-1, *tensor.shape[1:]) for part in (view[:, :per_group], view[:, per_group], view[:, per_group + 1])]


def join_wqkv(parts: list[Tensor], groups: int, per_group: int, head_dim: int) -> Tensor:
    """The inverse of ``split_wqkv``."""
    rest = parts[0].shape[1:]
    q, k, v = (part.reshape(groups, -1, head_dim, *rest) for part in parts)
    return torch.cat((q, k, v), dim=1).reshape(-1, *rest)


def entries(config: DecoderConfig) -> list[Entry]:
    """Every tensor on disk."""
    shape = (config.num_kv_heads, config.num_heads // config.num_kv_heads, config.head_dim)
    found = [Entry("model.tok_embeddings.weight", ("embed.weight",))]
    for n in range(config.num_layers):
        disk, ours = f"model.layers.{n}", f"layers.{n}"
        for kind in ("weight", "bias") if config.qkv_bias else ("weight",):
            parts = tuple(f"{ours}.attn.{name}.{kind}" for name in "qkv")
            found.append(
                Entry(f"{disk}.attention.wqkv.{kind}", parts, lambda t: split_wqkv(t, *shape), lambda ts: join_wqkv(ts, *shape))
            )
            found.append(Entry(f"{disk}.attention.wo.{kind}", (f"{ours}.attn.o.{kind}",)))
        for theirs, name in (("w1", "gate"), ("w3", "up"), ("w2", "down")):
            found.append(Entry(f"{disk}.feed_forward.{theirs}.weight", (f"{ours}.mlp.{name}.weight",)))
        found.append(Entry(f"{disk}.attention_norm.weight", (f"{ours}.attn_norm.weight",)))
        found.append(Entry(f"{disk}.ffn_norm.weight", (f"{ours}.mlp_norm.weight",)))
    found.append(Entry("model.norm.weight", ("norm.weight",)))
    if not config.tie_embeddings:
        found.append(Entry("output.weight", ("head.weight",)))
    return found
