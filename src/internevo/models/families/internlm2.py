"""InternLM2 and InternLM2.5: the same mathematics as Llama. On disk, q, k and v are one weight, grouped by key/value head."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ...config.model import Model
from ..config import DecoderConfig
from ..huggingface.naming import DiskRows, Names
from . import choices, llama

FAMILY = "INTERNLM2"
ARCHITECTURE = "InternLM2ForCausalLM"
HF_MODEL_TYPE = "internlm2"
HEAD = "output.weight"
FIXED = llama.FIXED


def problems(model: Model) -> Iterator[str]:
    """Yields what does not fit this family in a config's ``model`` section."""
    return choices.problems(model, FAMILY)


def from_section(model: Model) -> DecoderConfig:
    """Returns the decoder that a config's ``model`` section describes."""
    return replace(llama.from_section(model), family=FAMILY, mlp_bias=False)


def from_hf(hf: dict[str, Any]) -> DecoderConfig:
    """Returns the decoder that a Hugging Face ``config.json`` describes. ``bias`` (default: true) is for wqkv and wo."""
    bias = hf.get("bias", True)
    return replace(llama.from_hf(hf), family=FAMILY, qkv_bias=bias, o_bias=bias, mlp_bias=False)


def to_hf(config: DecoderConfig) -> dict[str, Any]:
    """Returns the Hugging Face ``config.json`` of a decoder, with the keys of transformers 4, which the family's code reads."""
    values = {
        **llama.common_to_hf(config, ARCHITECTURE, HF_MODEL_TYPE),
        "auto_map": llama.remote_code("internlm2", "InternLM2"),
        "bias": config.qkv_bias,
    }
    values.pop("rope_parameters", None)
    return values


def names(config: DecoderConfig) -> Names:
    """Returns where every parameter is on disk.

    The rows of wqkv are, for each key/value head: the query heads of its group, the key head, the value head.
    """
    found: Names = {"embed.weight": [DiskRows("model.tok_embeddings.weight")]}
    for n in range(config.num_layers):
        disk, ours = f"model.layers.{n}", f"layers.{n}"
        found[f"{ours}.attn_norm.weight"] = [DiskRows(f"{disk}.attention_norm.weight")]
        for kind in ("weight", "bias") if config.qkv_bias else ("weight",):
            wqkv = f"{disk}.attention.wqkv.{kind}"
            for part, (start, count) in _group(config).items():
                found[f"{ours}.attn.{part}.{kind}"] = [DiskRows(wqkv, start + g, count) for g in _groups(config)]
        for kind in ("weight", "bias") if config.o_bias else ("weight",):
            found[f"{ours}.attn.o.{kind}"] = [DiskRows(f"{disk}.attention.wo.{kind}")]
        found[f"{ours}.mlp_norm.weight"] = [DiskRows(f"{disk}.ffn_norm.weight")]
        for name, theirs in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
            found[f"{ours}.mlp.{name}.weight"] = [DiskRows(f"{disk}.feed_forward.{theirs}.weight")]
    found["norm.weight"] = [DiskRows("model.norm.weight")]
    if not config.tie_embeddings:
        found["head.weight"] = [DiskRows(HEAD)]
    return found


def _group(config: DecoderConfig) -> dict[str, tuple[int, int]]:
    """Returns the first row and the number of rows of q, k and v in a group."""
    d, queries = config.head_dim, config.num_heads // config.num_kv_heads * config.head_dim
    return {"q": (0, queries), "k": (queries, d), "v": (queries + d, d)}


def _groups(config: DecoderConfig) -> range:
    """Returns the first row of each group."""
    size = (config.num_heads // config.num_kv_heads + 2) * config.head_dim
    return range(0, config.num_kv_heads * size, size)
