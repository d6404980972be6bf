"""What families with experts share: options in a config's ``model`` section, keys in Hugging Face configs, names on disk."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ...config.model import Model
from ...errors import UsageError
from ..config import DecoderConfig, Experts
from ..huggingface.naming import DiskRows, Names
from . import choices

SHARED: choices.Allowed = dict.fromkeys(("num_shared_experts", "shared_expert_intermediate_size"), choices.ANY_VALUE)
"""Options of the shared expert."""


def problems(model: Model, family: str, shared: bool = False, more: choices.Allowed = choices.SLIDING_WINDOW) -> Iterator[str]:
    """Yields what does not fit a family with experts in a config's ``model`` section.

    Args:
        shared: whether the family has a shared expert, which sees every token.
        more: what else the family supports.
    """
    yield from choices.problems(model, family, {**choices.EXPERTS, **(SHARED if shared else {}), **more})
    if model.num_experts < 2:
        yield f"model_type = {family!r} needs model.num_experts > 1"
    if model.top_k > model.num_experts:
        yield f"model.top_k = {model.top_k} is greater than model.num_experts = {model.num_experts}"
    if beyond := [layer for layer in model.mlp_only_layers if not 0 <= layer < model.num_layers]:
        yield f"model.mlp_only_layers has {beyond[0]}, but the layers are 0 to {model.num_layers - 1}"
    yield from _capacity(model)
    if shared and not (model.num_shared_experts or model.shared_expert_intermediate_size):
        yield f"model_type = {family!r} needs model.num_shared_experts or model.shared_expert_intermediate_size"


def _capacity(model: Model) -> Iterator[str]:
    """Yields capacities that contradict that no token is dropped."""
    if model.moe_type == "GShard" and model.moe_layer_kwargs.drop_tokens:
        return
    why = "model.moe_layer_kwargs.drop_tokens = False" if model.moe_type == "GShard" else f"model.moe_type = {model.moe_type!r}"
    for key in ("capacity_factor", "eval_capacity_factor"):
        value = getattr(model.moe_layer_kwargs, key)
        if value is not None:
            yield (
                f"model.moe_layer_kwargs.{key} = {value}, but with {why} no token is dropped; leave it out, or set "
                "model.moe_type = 'GShard' and drop_tokens = True"
            )


def from_section(model: Model, shared_size: int = 0, normalize: bool = True) -> Experts:
    """Returns the experts that a config's ``model`` section describes.

    Args:
        shared_size: width of the shared expert; 0: none.
        normalize: the default of ``norm_topk_prob`` in the family.
    """
    kwargs = model.moe_layer_kwargs
    drops = model.moe_type == "GShard" and kwargs.drop_tokens
    capacity = (kwargs.capacity_factor or 1.0) if drops else 0.0
    evaluation = (kwargs.eval_capacity_factor or 1.0) if drops else 0.0
    return Experts(
        count=model.num_experts,
        top_k=model.top_k,
        size=model.moe_intermediate_size or model.mlp_width,
        normalize=normalize if model.norm_topk_prob is None else model.norm_topk_prob,
        shared_size=shared_size,
        dense_layers=dense_layers(model.num_layers, model.decoder_sparse_step, model.mlp_only_layers),
        capacity_factor=capacity,
        eval_capacity_factor=evaluation,
        min_capacity=kwargs.min_capacity,
        drop_policy=kwargs.drop_policy,
        balance_bias=kwargs.bias_update_speed is not None,
    )


def dense_layers(layers: int, step: int, dense: tuple[int, ...] | list[int]) -> tuple[int, ...]:
    """Returns the layers that have an MLP in place of experts: those in ``dense``, and those for which ``layer + 1`` is not a
    multiple of ``step``."""
    return tuple(n for n in range(layers) if n in dense or (n + 1) % step)


def count(hf: dict[str, Any]) -> int:
    """Returns the number of experts in a ``config.json``. transformers 5 has another name for it than older versions."""
    return hf["num_experts"] if "num_experts" in hf else hf["num_local_experts"]


def hf_dense_layers(hf: dict[str, Any]) -> tuple[int, ...]:
    """Returns the layers without experts, from ``decoder_sparse_step`` and ``mlp_only_layers`` of a ``config.json``."""
    return dense_layers(hf["num_hidden_layers"], hf.get("decoder_sparse_step", 1), hf.get("mlp_only_layers") or [])


def require(config: DecoderConfig, architecture: str) -> Experts:
    """Returns the experts of a model that will be written as ``architecture``.

    Raises:
        UsageError: if the model has none.
    """
    if config.experts is None:
        raise UsageError(f"a Hugging Face folder of {architecture} cannot describe this model: it has no experts")
    return config.experts


def to_hf(moe: Experts) -> dict[str, Any]:
    """Returns the keys of ``config.json`` that all Qwen families with experts have."""
    return {
        "num_experts": moe.count,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.size,
        "norm_topk_prob": moe.normalize,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(moe.dense_layers),
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
    }


def names(config: DecoderConfig, layer: int, router: str, expert: str, parts: dict[str, str]) -> Names:
    """Returns where the router and the experts of one layer are on disk.

    Args:
        router: the name of the router's weight on disk.
        expert: the beginning of the names of an expert's weights on disk, with {} for the expert's number.
        parts: "gate", "up" and "down" -> the end of the weight's name on disk.
    """
    assert config.experts is not None
    ours = f"layers.{layer}.mlp"
    found: Names = {f"{ours}.router.weight": [DiskRows(router)]}
    for part, theirs in parts.items():
        found[f"{ours}.experts.{part}.weight"] = [DiskRows(f"{expert.format(e)}.{theirs}") for e in range(config.experts.count)]
    return found
