"""Checks the options of a config's ``model`` section that only some families have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ...config.experts import MoeLayerKwargs
from ...config.model import Model
from ...config.option import Section
from ...wording import counted

DEFAULT_VALUES: dict[str, tuple[Any, ...]] = {
    "add_unit_offset": (None, False),
    "use_swiglu": (None, True),
    "norm_head": (None, False),
    "use_alibi": (False,),
    "mlp_bias": (False,),
    "use_sliding_window": (False,),
    "layer_windows": (None,),
    "no_rope_layers": (None,),
    "no_rope_layer_interval": (None,),
    "num_experts": (1,),
    "top_k": (1,),
    "moe_type": ("GShard",),
    "moe_layer_kwargs": (MoeLayerKwargs(),),
    "moe_intermediate_size": (None,),
    "norm_topk_prob": (None,),
    "decoder_sparse_step": (1,),
    "mlp_only_layers": ((),),
    "num_shared_experts": (0,),
    "shared_expert_intermediate_size": (None,),
    "q_lora_rank": (None,),
    "kv_lora_rank": (None,),
    "qk_nope_head_dim": (None,),
    "qk_rope_head_dim": (None,),
    "v_head_dim": (None,),
    "n_group": (1,),
    "topk_group": (1,),
    "routed_scaling_factor": (1.0,),
    "embedding_multiplier": (1.0,),
    "attention_multiplier": (None,),
    "residual_multiplier": (1.0,),
    "logits_scaling": (1.0,),
    "query_pre_attn_scalar": (None,),
    "attn_logit_softcapping": (None, 0),
    "final_logit_softcapping": (None, 0),
}
"""The values that each option may have in a family that does not support the option."""
ANY_VALUE = None
Allowed = Mapping[str, tuple[Any, ...] | None]
"""Option -> the values that it may have in a family, or ``ANY_VALUE``."""
MLP_BIAS: Allowed = {"mlp_bias": ANY_VALUE}
"""For families whose MLP may have biases."""
NO_ROPE: Allowed = dict.fromkeys(("no_rope_layers", "no_rope_layer_interval"), ANY_VALUE)
"""For families with layers without a rotary embedding, in a config's ``model`` section and in ``config.json``."""
SLIDING_WINDOW: Allowed = {"use_sliding_window": ANY_VALUE, "layer_windows": ANY_VALUE}
"""For families that support sliding windows."""
HF_WINDOWS: Allowed = {"sliding_window": ANY_VALUE, "use_sliding_window": ANY_VALUE}
"""The same in ``config.json``."""
EXPERTS: Allowed = dict.fromkeys(
    ("num_experts", "top_k", "moe_type", "moe_layer_kwargs", "moe_intermediate_size", "norm_topk_prob", "decoder_sparse_step",
     "mlp_only_layers"), ANY_VALUE,
)  # fmt: skip
"""For families with experts."""


def problems(model: Model, family: str, allowed: Allowed | None = None) -> Iterator[str]:
    """Yields one message for each option whose value the family does not support, or that another option makes useless.

    Args:
        allowed: what the family supports. For other options, ``DEFAULT_VALUES``.
    """
    for key, values in {**DEFAULT_VALUES, **(allowed or {})}.items():
        value = getattr(model, key)
        if values is not ANY_VALUE and value not in values:
            given = value.model_dump(exclude_defaults=True) if isinstance(value, Section) else value
            yield f"model.{key} = {given!r} is not supported by model_type = {family!r}; leave it out"
    given = model.model_fields_set
    if model.use_sliding_window and not model.sliding_window:
        yield "model.use_sliding_window needs model.sliding_window"
    for key in ("sliding_window", "max_window_layers"):
        if getattr(model, key) is not None and "use_sliding_window" not in given:
            yield f"model.{key} has an effect only with model.use_sliding_window = True; set it, or leave model.{key} out"
    if model.layer_windows is not None:
        if len(model.layer_windows) != model.num_layers:
            windows = counted(len(model.layer_windows), "number")
            yield f"model.layer_windows has {windows}, and model.num_layers = {model.num_layers}"
        if model.use_sliding_window:
            yield "model.layer_windows and model.use_sliding_window both set the windows; leave one out"
    if model.no_rope_layers is not None and len(model.no_rope_layers) != model.num_layers:
        numbers = counted(len(model.no_rope_layers), "number")
        yield f"model.no_rope_layers has {numbers}, and model.num_layers = {model.num_layers}"
    if model.no_rope_layers is not None and model.no_rope_layer_interval is not None:
        yield "model.no_rope_layers and model.no_rope_layer_interval both say which layers rotate; leave one out"
    if model.no_bias and (model.qkv_bias or model.o_bias):
        yield "model.no_bias = True contradicts model.qkv_bias or model.o_bias; leave one of them out"
    yield from _rope(model)


def no_attention_biases(model: Model, family: str) -> Iterator[str]:
    """Yields options that give attention biases, for families that have none there."""
    for key, value in (("no_bias", False), ("qkv_bias", True), ("o_bias", True)):
        if getattr(model, key) is value:
            yield f"model.{key} = {value} is not supported by model_type = {family!r}, whose attention has no biases"


def is_own(hf: dict[str, Any], model_type: str) -> bool:
    """Whether a Hugging Face config is of the family's own ``model_type``. One of another model, which is read under the
    family's name (``--family``), does not have the family's defaults."""
    return bool(hf.get("model_type", model_type) == model_type)


def _rope(model: Model) -> Iterator[str]:
    """Yields options of the rotary embedding that have no effect because of others."""
    dynamic = model.use_dynamic_ntk_rope or model.rope_type == "dynamic_ntk"
    name = "model.use_dynamic_ntk_rope" if model.use_dynamic_ntk_rope else "model.rope_type = 'dynamic_ntk'"
    if dynamic and model.rope_scaling is not None:
        yield f"model.rope_scaling and {name} both set the scaling of the rotary embedding; leave one out"
    if not dynamic and model.rope_scaling_factor != 1:
        yield (
            f"model.rope_scaling_factor = {model.rope_scaling_factor} has an effect only with model.use_dynamic_ntk_rope = "
            "True; set it, or write the factor into model.rope_scaling"
        )
    if model.use_alibi:
        for key in ("rope_base", "rope_scaling", "use_dynamic_ntk_rope", "rope_type"):
            if getattr(model, key) != Model.model_fields[key].default:
                yield f"model.{key} has no effect with model.use_alibi = True, which replaces the rotary one; leave it out"
