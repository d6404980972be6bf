"""Reads a Hugging Face ``config.json``, and checks the types and ranges of the values in it that describe a decoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ...config.rope import is_number
from ...errors import UsageError
from ...storage.jsonfile import read_object
from ...text.special_tokens import MODEL_KEYS
from ...wording import counted
from . import choices

COUNTS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "max_position_embeddings", "model_max_length", "num_experts", "num_local_experts", "num_experts_per_tok",
    "moe_intermediate_size", "decoder_sparse_step", "n_routed_experts", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim",
    "qk_rope_head_dim", "v_head_dim", "n_group", "topk_group",
)  # fmt: skip
SIZES = (
    "max_window_layers", "sliding_window", "no_rope_layer_interval", "shared_expert_intermediate_size", "n_shared_experts",
    "first_k_dense_replace",
)  # fmt: skip
MULTIPLIERS = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")
FLAGS = ("attention_bias", "mlp_bias", "bias", "qkv_bias", "tie_word_embeddings", "use_sliding_window", "norm_topk_prob")
MAY_BE_NULL = (
    "architectures",
    "rope_theta",
    "num_key_value_heads",
    "head_dim",
    "sliding_window",
    "model_max_length",
    "mlp_only_layers",
    "layer_types",
    "q_lora_rank",
    "n_group",
    "topk_group",
    "no_rope_layers",
    "no_rope_layer_interval",
    *MULTIPLIERS,
)
LAYER_TYPES = ("full_attention", "sliding_attention")


def _is_count(value: Any, least: int = 1) -> bool:
    return type(value) is int and value >= least


def _is_list(value: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(fits, value))


TYPES: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
    (COUNTS, _is_count, "a whole number of at least 1"),
    (SIZES, partial(_is_count, least=0), "a whole number"),
    (FLAGS, lambda value: isinstance(value, bool), "true or false"),
    (("rms_norm_eps", "rope_theta", *MULTIPLIERS), lambda value: is_number(value) and value > 0, "a number above 0"),
    (("mlp_only_layers", "no_rope_layers"), partial(_is_list, fits=partial(_is_count, least=0)), "a list of whole numbers"),
    (("layer_types",), partial(_is_list, fits=LAYER_TYPES.__contains__), f"a list of {' and '.join(LAYER_TYPES)}"),
    (("architectures",), partial(_is_list, fits=lambda name: isinstance(name, str)), "a list of names"),
)
"""Keys, the test that their values pass, and what they must be in a message."""
FIXED: choices.Allowed = {
    "quantization_config": (None,),
    "sliding_window": (None, 0), "use_sliding_window": (False,), "attention_chunk_size": (None,),
    "attn_logit_softcapping": (None, 0), "final_logit_softcapping": (None, 0), "query_pre_attn_scalar": (None,),
    "attention_multiplier": (None,), "attn_temperature_tuning": (False, None), "clip_qkv": (None,),
    "qk_layernorm": (False, None), "use_qk_norm": (False, None), "is_causal": (True, None),
    "use_bidirectional_attention": (False, None), "rope_interleave": (False, None),
    "no_rope_layers": (None, []), "no_rope_layer_interval": (None, 0),
    "embedding_multiplier": (1, None), "residual_multiplier": (1, None), "logits_scaling": (1, None), "logit_scale": (1, None),
    "scale_emb": (1, None), "scale_depth": (None,), "dim_model_base": (None,),
}  # fmt: skip
"""The values that keys may have in a family that does not name them in its own FIXED: those with which they change nothing.
Other models (Mistral, Granite, SmolLM3, MiniCPM, ...) have these keys, and tensors of the same names."""
ROTATE_NEIGHBOURS = ("ernie4_5", "helium")
"""Values of ``model_type``, of models with the tensors of Llama, in which neighbours form the pairs that rotate."""


def read_config(folder: Path) -> dict[str, Any]:
    """Reads ``config.json`` of a Hugging Face folder.

    Raises:
        UsageError: if the folder has no ``config.json``, or it is not a JSON object or not that of a model.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UsageError(f"{folder} is not a Hugging Face folder: it has no config.json{what_else(folder)}")
    values = read_object(path)
    if is_of_tokenizer(values):
        raise UsageError(f"{folder} has a tokenizer and no model: its config.json has only {', '.join(values)}")
    return values


def is_of_tokenizer(values: dict[str, Any]) -> bool:
    """Whether a ``config.json`` says nothing about a model but what its tokenizer needs, as in a copy of a tokenizer."""
    return bool(values) and values.keys() <= set(MODEL_KEYS)


def what_else(path: Path) -> str:
    """Returns the words of a message about a path that is taken for a model: the other kind that it is, and what to do."""
    if (path / "adapter_config.json").is_file():
        return (
            "; it has adapters of the peft library without their model: merge them there, or train on from both "
            "(ckpt.load_ckpt_info.adapter)"
        )
    if path.suffix == ".gguf" or any(path.glob("*.gguf")):
        return "; GGUF files are written for llama.cpp and not read here: give the model from which it was made"
    return "; give its folder" if path.is_file() else ""


def problems(hf: dict[str, Any]) -> Iterator[str]:
    """Yields what is wrong with the values. Whether keys are missing is not checked: families have defaults."""
    wrong = list(_types(hf))
    yield from wrong or _contradictions(hf)


def _types(hf: dict[str, Any]) -> Iterator[str]:
    for keys, fits, what in TYPES:
        for key in keys:
            if key in hf and not (hf[key] is None and key in MAY_BE_NULL) and not fits(hf[key]):
                yield f"{key} = {hf[key]!r} must be {what}"


def _contradictions(hf: dict[str, Any]) -> Iterator[str]:
    heads, kv, width = hf.get("num_attention_heads"), hf.get("num_key_value_heads"), hf.get("hidden_size")
    if heads and kv and heads % kv:
        yield f"num_attention_heads = {heads} is not a multiple of num_key_value_heads = {kv}"
    if heads and width and not hf.get("head_dim") and width % heads:
        yield f"hidden_size = {width} is not a multiple of num_attention_heads = {heads}, and there is no head_dim"
    if (hf.get("head_dim") or 0) % 2:
        yield f"head_dim = {hf['head_dim']} must be even for the rotary embedding"
    kinds, layers = hf.get("layer_types"), hf.get("num_hidden_layers")
    if kinds is not None and len(kinds) != layers:
        yield f"layer_types has {counted(len(kinds), 'layer')}, and num_hidden_layers = {layers}"
    experts = hf.get("num_experts") or hf.get("num_local_experts") or hf.get("n_routed_experts")
    if experts and hf.get("num_experts_per_tok", 1) > experts:
        yield f"num_experts_per_tok = {hf['num_experts_per_tok']} is greater than the number of experts, {experts}"
