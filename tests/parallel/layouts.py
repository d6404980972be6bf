"""Layouts that tests compare with one process: the named ones, the full table, and random compositions."""

import itertools
import os
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

from internevo.config import validate
from internevo.train.check import missing_features, problems
from tests.conftest import tiny

DRAWN = int(os.environ.get("INTERNEVO_TEST_COMPOSITIONS", "24"))
"""Number of random compositions."""
ROWS = 24
"""Rows of a global batch."""
STEPS = 3
"""Steps of a run that is compared with one process: the last has weights of two updates, the second of which has moments."""
COMMON: dict[str, Any] = {
    "model__vocab_size": 104, "adam__lr": 2e-3, "adam__adam_eps": 1e-6, "data__total_steps": STEPS,
    "data__global_batch_size": ROWS, "lr_scheduler__total_steps": 20,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "six layers": {"model__num_layers": 6},
    "biased, one key/value head": {"model__no_bias": False, "model__mlp_bias": True, "model__num_kv_attention_heads": 1},
    "gemma": {"model_type": "GEMMA", "model__head_dim": 16, "loss__label_smoothing": 0.1},
    "alibi": {"model_type": "BAICHUAN2", "model__use_alibi": True, "model__num_kv_attention_heads": 4},
    "qwen3, windows": {"model_type": "QWEN3", "model__use_sliding_window": True, "model__sliding_window": 9},
    "adapters": {
        "model__lora": {"rank": 3, "alpha": 6, "targets": ["wqkv", "o_proj", "w1", "up", "down"]},
        "model__num_kv_attention_heads": 1,
        "adam__lr": 2e-2,
        "adam__adam_eps": 1e-3,
    },
    "adapters on q and o only": {
        "model__lora": {"rank": 3, "alpha": 6, "targets": ["wq", "wo"]},
        "model__num_kv_attention_heads": 1,
        "adam__lr": 2e-2,
        "adam__adam_eps": 1e-3,
    },
    "muon": {"muon": {}},
    "internlm2, tied": {"model_type": "INTERNLM2", "model__tie_word_embeddings": True},
}
PADDED: dict[str, Any] = {"data__use_packed_dataset": False}
RECOMPUTED: dict[str, Any] = {"model__checkpoint": True}


Case = tuple[int, dict[str, Any]]
"""Processes, and changes to the config."""


def layout(
    processes: int,
    mode: str = "mtp",
    tensor: int = 1,
    weight: int = 1,
    zero: int = -1,
    fsdp: bool = False,
    weights: dict[str, Any] | None = None,
    **more: Any,
) -> Case:
    """Returns (processes, changes to the config). A step has two micro-batches if there are enough rows."""
    rows = max(1, ROWS // 2 // (processes // tensor))
    return processes, {
        "parallel__tensor": {"size": tensor, "mode": mode}, "parallel__weight": {"size": weight, **(weights or {})},
        "parallel__zero1": {"size": zero, "fsdp": fsdp}, "data__micro_bsz": rows, **more,
    }  # fmt: skip


def pipelined(
    processes: int, stages: int, chunks: int = 1, micro_batches: int = 4, tensor: int = 1, layers: int = 6, **more: Any
) -> Case:
    """Returns a layout with a pipeline of ``stages`` ranks, and ``chunks`` stages on each."""
    _, changes = layout(processes, tensor=tensor, **more)
    rows = ROWS // (micro_batches * (processes // (stages * tensor)))
    return processes, {
        **changes, "model__num_layers": layers, "parallel__pipeline": {"size": stages}, "model__num_chunks": chunks,
        "data__micro_bsz": rows,
    }  # fmt: skip


def scheduled(mode: str, case: Case) -> Case:
    """Returns a pipeline with another schedule."""
    processes, changes = case
    return processes, {**changes, "parallel__pipeline": {**changes["parallel__pipeline"], "mode": mode}}


EXPERTS: dict[str, Any] = {
    "model_type": "QWEN2MOE", "model__num_experts": 4, "model__top_k": 2, "model__num_shared_experts": 1,
    "model__moe_intermediate_size": 24,
}  # fmt: skip
DEEPSEEK: dict[str, Any] = {
    "model__num_layers": 3, "model__num_kv_attention_heads": None, "model__kv_lora_rank": 16, "model__qk_nope_head_dim": 8,
    "model__qk_rope_head_dim": 4, "model__v_head_dim": 8, "model__num_experts": 4, "model__moe_intermediate_size": 24,
    "model__num_shared_experts": 1, "model__mlp_only_layers": [0], "model__moe_type": "Dropless", "adam__adam_eps": 1e-3,
    "loss__moe_loss_coeff": 0,  # which depends on the size of micro-batches
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "gemma 3": {
        "model_type": "GEMMA3", "model__num_layers": 6, "model__use_sliding_window": True, "model__sliding_window": 9,
        "model__rope_base": 1e6, "model__num_kv_attention_heads": 1, "adam__adam_eps": 1e-4,
    },
    "gemma 2": {
        "model_type": "GEMMA2", "model__use_sliding_window": True, "model__sliding_window": 9, "model__head_dim": 16,
        "model__query_pre_attn_scalar": 12, "model__attn_logit_softcapping": 1.0, "model__final_logit_softcapping": 2.0,
        "adam__adam_eps": 1e-4,
    },
    "deepseek 2": {**DEEPSEEK, "model_type": "DEEPSEEKV2", "model__n_group": 2, "model__top_k": 1},
    "deepseek 3": {
        **DEEPSEEK, "model_type": "DEEPSEEKV3", "model__q_lora_rank": 12, "model__top_k": 2, "model__n_group": 2,
        "model__routed_scaling_factor": 2.5, "model__moe_layer_kwargs__bias_update_speed": 1e-3,
        "model__rope_scaling": {
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "mscale": 1.0, "mscale_all_dim": 1.0,
        },
    },
    "smollm 3": {
        "model_type": "SMOLLM3", "model__num_layers": 4, "model__no_rope_layer_interval": 2, "model__use_sliding_window": True,
        "model__sliding_window": 9,
    },
    "granite": {
        "model_type": "GRANITE", "model__embedding_multiplier": 7.0, "model__attention_multiplier": 0.4,
        "model__residual_multiplier": 0.3, "model__logits_scaling": 3.0,
    },
    "glm 4": {"model_type": "GLM4", "model__head_dim": 16},
    "phi 3, long": {
        "model_type": "PHI3",
        "model__rope_scaling": {
            "rope_type": "longrope", "short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [2.0, 3.0, 5.0, 9.0],
            "original_max_position_embeddings": 16, "partial_rotary_factor": 0.5,
        },
        "model__head_dim": 16, "model__max_position_embeddings": 64,
    },
}  # fmt: skip
"""Models of families with mathematics of their own, which are not among those of random compositions."""


def two_d(heads: int, contexts: int, head_first: bool = True) -> dict[str, Any]:
    """Returns the changes of 2D sequence parallelism."""
    placement = {"head_first": head_first}
    sizes = {"enable": True, "head_size": heads, "context_size": contexts, "device_placement_strategy": placement}
    return {"parallel__sequence_2D": sizes}


PREFETCH: dict[str, Any] = {"overlap": True, "forward_overlap_per": "module"}
NAMED = {
    "mtp 2": layout(2, "mtp", 2),
    "mtp 4, recomputed": layout(4, "mtp", 4, **RECOMPUTED),
    "msp 2, no zero": layout(4, "msp", 2, zero=1),
    "msp 2, fsdp, recomputed": layout(4, "msp", 2, fsdp=True, **RECOMPUTED),
    "fsp 2, zero 2": layout(4, "fsp", 2),
    "fsp 4": layout(4, "fsp", 4),
    "isp: sequence over 2": layout(2, "isp", 2),
    "isp: weights over 2": layout(2, "isp", 1, 2),
    "isp 2, weights over 4, overlapped": layout(4, "isp", 2, 4, weights={"overlap": True}),
    "isp 4, weights over 2, overlapped, recomputed": layout(4, "isp", 4, 2, weights=PREFETCH, **RECOMPUTED),
    "isp 2, weights over 2, zero 2, half recomputed": layout(4, "isp", 2, 2, weights=PREFETCH, model__checkpoint=0.5),
    "isp 2, weights over 2, recomputed, attention kept": layout(
        4, "isp", 2, 2, weights={"overlap": True}, model__checkpoint=True, selective_checkpoint=True
    ),
    "isp 4, weights over 2, zero 2 of 4": layout(8, "isp", 4, 2, zero=2, weights=PREFETCH),
    "isp 2, context over 2": layout(2, "isp", 2, **two_d(1, 2)),
    "isp 4, heads over 2, context over 2, recomputed": layout(4, "isp", 4, **two_d(2, 2), **RECOMPUTED),
    "isp 4, heads over 2, context over 2 neighbours, weights over 2": layout(
        4, "isp", 4, 2, weights=PREFETCH, **two_d(2, 2, False)
    ),
    "isp 8, context over 4, fsdp": layout(8, "isp", 8, fsdp=True, **two_d(2, 4)),
    "isp 4, context over 2, attention recomputed and kept": layout(
        4, "isp", 4, **two_d(2, 2), model__checkpoint="attention", selective_checkpoint=True
    ),
    "isp 4, context over 4, padded": layout(4, "isp", 4, **two_d(1, 4), **PADDED),
    "isp 4, heads over 2, context over 2, padded, half recomputed": layout(
        4, "isp", 4, **two_d(2, 2), **PADDED, model__checkpoint=0.5
    ),
    "msp 2, fsdp over 2 of 4": layout(8, "msp", 2, zero=2, fsdp=True),
}


def full_table() -> Iterator[tuple[str, Case]]:
    """Yields (name, layout) of each mode x {ZeRO over 1, 2, all; FSDP} x {packed, padded} x {recomputed or not}."""
    inner = [("mtp", 1, 1), ("mtp", 2, 1), ("msp", 2, 1), ("fsp", 2, 1), ("isp", 2, 1), ("isp", 1, 2), ("isp", 2, 2)]
    data: list[dict[str, Any]] = [{"zero": 1}, {"zero": 2}, {"zero": -1}, {"fsdp": True}]
    for (mode, t, w), kind, form, memory in itertools.product(inner, data, ({}, PADDED), ({}, RECOMPUTED)):
        name = ", ".join([f"{mode} {t} {w}", *(f"{k} {v}" for k, v in kind.items()), *form, *memory])
        yield name, layout(4, mode, t, w, **kind, **form, **memory)


EXPERT_MODELS: dict[str, dict[str, Any]] = {
    "experts with capacity": {**EXPERTS, "loss__moe_loss_coeff": 0.1, "loss__moe_z_loss_coeff": 0.01},
    "dropless experts": {
        "model_type": "QWEN3MOE", "model__num_experts": 4, "model__top_k": 2, "model__moe_intermediate_size": 24,
        "model__moe_type": "Dropless", "model__mlp_only_layers": [0], "loss__moe_loss_coeff": 0.05,
    },
    "muon, dropless experts": {
        **EXPERTS, "model__moe_type": "Dropless", "loss__moe_loss_coeff": 0.05, "muon": {}, "adam__adam_eps": 1e-3,
    },
    "eight experts": {
        "model_type": "MIXTRALMOE", "model__num_experts": 8, "model__top_k": 2,
        "model__moe_layer_kwargs": {"capacity_factor": 0.8}, "loss__moe_loss_coeff": 0.1,
    },
}  # fmt: skip


class Composition(NamedTuple):
    """A random combination of everything that a layout can have."""

    processes: int
    layout: dict[str, Any]
    """Changes to the config that must not change what is trained."""
    model: str
    """A key of ``MODELS`` or ``EXPERT_MODELS``."""
    training: dict[str, Any]
    """The other changes to the config."""

    @property
    def changes(self) -> dict[str, Any]:
        """All changes to the config, for the run of this composition."""
        return {**self.one_process, **self.layout}

    @property
    def one_process(self) -> dict[str, Any]:
        """All changes to the config, for the run on one process."""
        model = {**MODELS, **EXPERT_MODELS}[self.model]
        return {**COMMON, "data__total_steps": STEPS, **model, **self.training}


def compositions(seed: int) -> Iterator[Composition]:
    """Yields random combinations that the rules of the config accept. The same seed yields the same ones."""
    draw = random.Random(seed)
    while True:
        drawn = _draw(draw)
        config = validate(tiny(**drawn.changes))
        if not problems(config, drawn.processes) and not missing_features(config):
            yield drawn


def composition(seed: int) -> Composition:
    """Returns the first one of ``compositions``."""
    return next(compositions(seed))


def _draw(draw: random.Random) -> Composition:
    """Draws a combination, which need not be possible."""
    processes, mode = draw.choice([2, 4, 4, 8]), draw.choice(["mtp", "msp", "fsp", "isp", "isp"])
    stages = draw.choice([n for n in (1, 1, 1, 2, 2, 4, 8) if processes % n == 0])
    sizes = [n for n in (1, 2, 4, 8) if processes // stages % n == 0]
    schedule = draw.choice(["1F1B", "1F1B", "ZBH1", "ZBV"]) if stages > 1 else "1F1B"
    chunks = 2 if schedule == "ZBV" else draw.choice([1, 2]) if stages > 1 and schedule == "1F1B" else 1
    models = draw.choice([list(MODELS), list(EXPERT_MODELS), list(EXPERT_MODELS)])
    isp, experts = mode == "isp", models[0] in EXPERT_MODELS
    layers = draw.choice([n for n in (4, 8) if n >= stages * chunks] or [8])
    split: list[int] = []
    if stages * chunks == 2 and draw.random() < 0.3:
        split = [1, layers - 1]
    tensor = draw.choice([*sizes[:3], *sizes[1:3]])
    layout: dict[str, Any] = {
        "parallel__tensor": {"size": tensor, "mode": mode},
        "parallel__weight": {
            "size": draw.choice(sizes) if isp else 1, "overlap": draw.random() < 0.7,
            "forward_overlap_per": draw.choice(["module", "layer"]),
            "launch_allgather_before": draw.choice(["wqkv", "attn", "wo", "w1"]),
        },
        "parallel__zero1": {"size": draw.choice([-1, *sizes]), "fsdp": draw.random() < 0.3},
        "parallel__pipeline": {"size": stages, "mode": schedule, "layers": split},
        "model__num_chunks": chunks,
        "model__checkpoint": draw.choice([False, False, True, 0.5, "attention"]),
        "selective_checkpoint": draw.random() < 0.3,
        "hybrid_zero_optimizer__overlap_sync_param": draw.random() < 0.5,
        "hybrid_zero_optimizer__overlap_sync_grad": draw.random() < 0.5,
        "hybrid_zero_optimizer__reduce_bucket_size": draw.choice([None, 30_000]),
        "parallel__expert": {"size": draw.choice([-1, 1, 2, 4]) if experts else -1, "no_tp": experts and draw.random() < 0.4},
        "parallel__expert_weight": {
            "size": draw.choice(sizes) if experts and isp else 1, "overlap": experts and isp and draw.random() < 0.7
        },
        "parallel__expert_zero1": {"size": draw.choice([-1, -1, 1, 2]) if experts else -1},
    }  # fmt: skip
    if isp and tensor > 1 and draw.random() < 0.5:
        contexts = draw.choice([n for n in (2, 4) if tensor % n == 0])
        layout |= two_d(tensor // contexts, contexts, draw.random() < 0.7)
    training: dict[str, Any] = {
        "model__num_layers": layers, "data__micro_bsz": 3,  # routing is by micro-batch
        "data__use_packed_dataset": draw.random() < 0.7,
    }  # fmt: skip
    if experts:
        training["loss__moe_loss_kind"] = draw.choice(["gshard", "pooled"])
        training["model__moe_layer_kwargs__bias_update_speed"] = draw.choice([None, 1e-3])
    return Composition(processes, layout, draw.choice(models), training)
