"""InternLM2 and 2.5: Llama's mathematics; on disk, q, k and v are one weight, grouped by key/value head."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ...config.model import Model
from ..config import DecoderConfig
from ..huggingface.naming import Names, Piece
from . import choices, llama

FAMILY = "INTERNLM2"
ARCHITECTURE = "InternLM2ForCausalLM"
HF_MODEL_TYPE = "internlm2"
HEAD = "output.weight"
FIXED = llama.FIXED


def problems(model: Model) -> Iterator[str]:
    """What does not fit this family in a config's ``model`` section."""
    return choices.problems(model, FAMILY)


def from_section(model: Model) -> DecoderConfig:
    """The decoder that a config's ``model`` section describes."""
    return replace(llama.from_section(model), family=FAMILY, mlp_bias=False)


def from_hf(hf: dict[str, Any]) -> DecoderConfig:
    """The decoder that a Hugging Face ``config.json`` describes. ``bias`` (default true) is on wqkv and wo."""
    bias = hf.get("bias", True)
    return replace(llama.from_hf(hf), family=FAMILY, qkv_bias=bias, o_bias=bias, mlp_bias=False)


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """The Hugging Face ``config.json``; the folder's own code reads the keys of before transformers 5."""
    values = {
        **llama.common_to_hf(config, ARCHITECTURE, HF_MODEL_TYPE),
        "auto_map": llama.remote_code("internlm2", "InternLM2"),
        "bias": config.qkv_bias,
    }
    values.pop("rope_parameters", None)
    return values


def names(config: DecoderConfig) -> Names:
    """Every parameter on disk. Rows of wqkv: for each key/value head, its group's queries, its key, its value."""
    found: Names = {"embed.weight": [Piece("model.tok_embeddings.weight")]}
    for n in range(config.num_layers):
        disk, ours = f"model.layers.{n}", f"layers.{n}"
        found[f"{ours}.attn_norm.weight"] = [Piece(f"{disk}.attention_norm.weight")]
        for kind in ("weight", "bias") if config.qkv_bias else ("weight",):
            wqkv = f"{disk}.attention.wqkv.{kind}"
            for part, (start, count) in _group(config).items():
                found[f"{ours}.attn.{part}.{kind}"] = [Piece(wqkv, start + g, count) for g in _groups(config)]
        for kind in ("weight", "bias") if config.o_bias else ("weight",):
            found[f"{ours}.attn.o.{kind}"] = [Piece(f"{disk}.attention.wo.{kind}")]
        found[f"{ours}.mlp_norm.weight"] = [Piece(f"{disk}.ffn_norm.weight")]
        for name, theirs in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
            found[f"{ours}.mlp.{name}.weight"] = [Piece(f"{disk}.feed_forward.{theirs}.weight")]
    found["norm.weight"] = [Piece("model.norm.weight")]
    if not config.tie_embeddings:
        found["head.weight"] = [Piece(HEAD)]
    return found


def _group(config: DecoderConfig) -> dict[str, tuple[int, int]]:
    """First row and number of rows of q, k and v within a group."""
    d, queries = config.head_dim, config.num_heads // config.num_kv_heads * config.head_dim
    return {"q": (0, queries), "k": (queries, d), "v": (queries + d, d)}


def _groups(config: DecoderConfig) -> range:
    """First row of each group."""
    size = (config.num_heads // config.num_kv_heads + 2) * config.head_dim
    return range(0, config.num_kv_heads * size, size)
