"""What families with experts share: their options in a config section and in Hugging Face configs, and names on disk."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ...config.model import Model
from ...errors import UsageError
from ..config import DecoderConfig, Experts
from ..huggingface.naming import Names, Piece
from . import choices


def problems(model: Model, family: str, shared: bool = False) -> Iterator[str]:
    """What does not fit a family with experts in a config's ``model`` section; ``shared``: one of them sees every token."""
    own: dict[str, Any] = {**choices.WINDOWS, "num_experts": choices.ANY}
    if shared:
        own |= {"num_shared_experts": choices.ANY, "shared_expert_intermediate_size": choices.ANY}
    yield from choices.problems(model, family, own)
    if model.num_experts < 2:
        yield f"model_type = {family!r} needs model.num_experts > 1"
    if model.top_k > model.num_experts:
        yield f"model.top_k = {model.top_k} is above model.num_experts = {model.num_experts}"
    if shared and not (model.num_shared_experts or model.shared_expert_intermediate_size):
        yield f"model_type = {family!r} needs model.num_shared_experts or model.shared_expert_intermediate_size"


def from_section(model: Model, shared_size: int = 0, normalize: bool = True) -> Experts:
    """The experts of a config's ``model`` section. ``moe_type`` GShard has a capacity, Dropless none."""
    kwargs = model.moe_layer_kwargs
    capacity = kwargs.capacity_factor or 0.0
    evaluation = kwargs.eval_capacity_factor or 0.0
    if model.moe_type == "GShard" and kwargs.drop_tokens:
        capacity, evaluation = capacity or 1.0, evaluation or 1.0
    elif model.moe_type == "GShard":
        capacity = evaluation = 0.0
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
    )


def dense_layers(layers: int, step: int, dense: tuple[int, ...] | list[int]) -> tuple[int, ...]:
    """A layer has experts unless it is among ``dense`` or ``layer + 1`` is no multiple of ``step``."""
    return tuple(n for n in range(layers) if n in dense or (n + 1) % step)


def count(hf: dict[str, Any]) -> int:
    """Number of experts, under either of its names (transformers 5 renames it)."""
    return hf["num_experts"] if "num_experts" in hf else hf["num_local_experts"]


def hf_dense_layers(hf: dict[str, Any]) -> tuple[int, ...]:
    """By ``decoder_sparse_step`` and ``mlp_only_layers``."""
    return dense_layers(hf["num_hidden_layers"], hf.get("decoder_sparse_step", 1), hf.get("mlp_only_layers") or [])


def of(config: DecoderConfig, architecture: str) -> Experts:
    """The experts of a model that is to be written as ``architecture``.

    Raises:
        UsageError: when it has none.
    """
    if config.experts is None:
        raise UsageError(f"a Hugging Face folder of {architecture} cannot hold this model: it has no experts")
    return config.experts


def to_hf(moe: Experts) -> dict[str, Any]:
    """The keys that Qwen's kinds share."""
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
    """Router and experts of one layer.

    Args:
        router: the router's name on disk.
        expert: beginning of an expert's names on disk, with {} for its number.
        parts: gate, up and down -> their ends of names on disk.
    """
    assert config.experts is not None
    ours = f"layers.{layer}.mlp"
    found: Names = {f"{ours}.router.weight": [Piece(router)]}
    for part, theirs in parts.items():
        found[f"{ours}.experts.{part}.weight"] = [Piece(f"{expert.format(e)}.{theirs}") for e in range(config.experts.count)]
    return found
